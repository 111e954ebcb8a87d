# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
import argparse

PURPOSE = "a pruner to the Hub, with its code, processor, results and card, in one commit"


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", help="folder or Hub id of a pruner")
    parser.add_argument("repo_id", help="where to: user/name")
    parser.add_argument("--merged", action="store_true", help="all weights, not the pruner's alone")
    parser.add_argument("--base", help="Hub id of the base, where the checkpoint names a folder")
    parser.add_argument("--results", nargs="+", default=[], metavar="JSON", help="of benchmarks/, for the card")
    parser.add_argument("--picture", metavar="PNG", help="of kept tokens, such as `learnpruner compare` draws")
    parser.add_argument("--private", action="store_true", default=None, help="where the repository is made")
    parser.add_argument("--revision", help="branch")
    parser.add_argument("--create-pr", action="store_true", help="as a pull request")
    parser.add_argument("--license", help="SPDX identifier, for the card")
    parser.add_argument("--commit-message", default="Upload pruner")
    parser.add_argument("--dry-run", action="store_true", help="list files, sizes and deletions; upload nothing")


def run(**options) -> None:
    from learnpruner.hub_cards.push import push_checkpoint

    print(push_checkpoint(**options))
