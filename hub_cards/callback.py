# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""For the stock `Trainer`, whose own push is a stub of a card and a pickle of its arguments."""

from huggingface_hub import HfApi
from huggingface_hub.utils import validate_repo_id
from transformers import ProcessorMixin, TrainerCallback
from transformers.trainer_utils import HubStrategy

from .checks import hub_reached
from .push import check_model, pin_base, push_pruner
from .repository import find, writable


class PrunerHubCallback(TrainerCallback):
    """Lets `Trainer(push_to_hub=True)` push once, at the end of training, what `model.push_to_hub` pushes.

    ```python
    arguments = TrainingArguments(..., push_to_hub=True, hub_model_id="user/name")
    Trainer(model, arguments, ..., callbacks=[PrunerHubCallback()]).train()
    ```

    `Trainer` uploads its whole folder by itself, and asks neither model nor callbacks: so `args.push_to_hub` is
    switched off once the trainer is made, and `trainer.push_to_hub()` raises. [`PrunerTrainer`] needs no callback.

    Args:
        options: Those of [`push_pruner`], which win over the trainer's (`hub_token`, `hub_revision`,
            `hub_private_repo`, its `processing_class` where that is a processor, and no tokenizer alone).

    Raises:
        `OSError`: when the trainer is made, without a token that may write.
        `ValueError`: when the trainer is made, where there is nothing to push to, or `hub_strategy` would push
            checkpoints, which hold pickles; and as `push_pruner` does.
    """

    def __init__(self, **options):
        self.options = options

    def on_init_end(self, args, state, control, model=None, **kwargs):
        if not args.push_to_hub or args.hub_model_id is None:
            raise ValueError("PrunerHubCallback needs push_to_hub=True and a hub_model_id to push to.")
        if args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            raise ValueError("hub_strategy is 'end': checkpoints hold pickles, which are not pushed.")
        check_model(model)
        # Rather now than after the training.
        options = self._options(args)
        pin_base(model, options.get("merged", False), options["token"])
        if state.is_world_process_zero:
            validate_repo_id(args.hub_model_id)
            api, create_pr = HfApi(token=options["token"]), options.get("create_pr", False)
            with hub_reached():
                repo_id = writable(api, args.hub_model_id, create_pr)
                find(api, repo_id, options["revision"], options["private"], create_pr)
        args.push_to_hub = False

    def on_train_end(self, args, state, control, model=None, processing_class=None, **kwargs):
        if state.is_world_process_zero:
            # A tokenizer is not all that others need: without a processor, the checkpoint's or its base's is pushed.
            processor = processing_class if isinstance(processing_class, ProcessorMixin) else None
            own = {"processor": processor, "commit_message": "End of training"}
            push_pruner(model, args.hub_model_id, **{**own, **self._options(args)})

    def _options(self, args) -> dict:
        own = {"token": args.hub_token, "revision": args.hub_revision, "private": args.hub_private_repo}
        return {**own, **self.options}

    def on_push_begin(self, args, state, control, **kwargs):
        raise ValueError("The pruner was pushed when the training ended; push again with model.push_to_hub(repo_id).")
