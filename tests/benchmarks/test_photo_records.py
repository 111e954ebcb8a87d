"""What the photo bench's records in the tree say, and that its page shows them."""

from pathlib import Path

import photo
import photo_conditions

PAGE = Path(__file__).parents[2] / "examples" / "photo_vqa" / "RESULTS.md"
LEVEL = photo.level_of("a", 0)


def test_the_bench_may_judge():
    assert [one for one in photo_conditions.judge(LEVEL) if not one.met] == []


def test_every_question_is_answered_and_there_are_enough():
    (unpruned,) = photo.records(photo.UNPRUNED, LEVEL)
    assert unpruned["n"] == len(unpruned["answers"]["given"]) >= 2000
    for asked in photo.CONDITIONS:
        for record in photo.records(asked, LEVEL):
            assert {name: record[name] for name in ("n", "data", "base_sha256")} == {
                name: unpruned[name] for name in ("n", "data", "base_sha256")
            }
            assert (record["pixels_sha256"] == unpruned["pixels_sha256"]) == (not asked.other)


def test_the_page_shows_the_records():
    page = PAGE.read_text()
    for part in photo.PARTS:
        assert photo.table(part, 0) in page
    assert photo_conditions.table(LEVEL) in page
