"""A trial: the second cut takes part in training.

    python benchmarks/second_cut.py CONFIG [--name value ...]          # as learnpruner train, with objective: hard

Before each step, the unpruned model's text attention in front of layer k ranks the vision tokens. From layer k on the
gated forward sees, of the tokens that the first cut's hard gates keep, the R2 that rank highest, as inference does; the
first cut's module is taught by what both leave. (At inference the ranking comes from a model that sees R1 tokens.)
"""

import sys

import torch

from learnpruner.attention_learnpruner import HARD
from learnpruner.cuts_learnpruner import Cut, TextAttention
from learnpruner.scores_learnpruner import top_k
from learnpruner.training import command
from learnpruner.training.trainer import PrunerTrainer


class SecondCutTrainer(PrunerTrainer):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.ranking = self.vision = None
        first = self.model.config.pruner_layer
        for layer in self.model.model.language_model.layers[first:]:
            layer.register_forward_pre_hook(self._drop, with_kwargs=True)

    def compute_loss(self, model, inputs, *args, **kwargs):
        if model.training:
            config, given = self.model.config, {**inputs}
            # One token less than all, so that there is a cut whose scores are told.
            cut = Cut(config.pruner_layer, lambda count: count - 1, TextAttention(config.pruner_query))
            model.eval()
            with torch.no_grad():
                scores = self.model(**given, schedule=(cut,)).vision_scores[0]
            model.train()
            self.ranking, self.vision = scores, ~scores.isnan()
        try:
            return super().compute_loss(model, inputs, *args, **kwargs)
        finally:
            self.ranking = None

    def _drop(self, layer, args, arguments):
        """Hands a layer behind the second cut harder gates. Nothing is hard in the teacher's forward."""
        hard = arguments.get(HARD)
        if hard is None or self.ranking is None:
            return None
        left = hard & self.vision
        counts = (left.sum(1) / self.model.config.pruner_stage_ratio).round().long().clamp_min(1)
        kept = top_k(self.ranking, left, counts) & left
        return args, {**arguments, HARD: kept | (hard & ~self.vision)}


def main(argv: list[str]) -> int:
    command.PrunerTrainer = SecondCutTrainer
    settings = command.parse_arguments(argv[0], argv[1:])
    if settings.training.objective != "hard" or settings.training.hard_from:
        print("second_cut: the objective is 'hard', from the first step.", file=sys.stderr)
        return 2
    command.train(*settings)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
