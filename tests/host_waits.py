"""What makes the host wait for a device."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Waits(TorchDispatchMode):
    """Logs every call for which the host would wait on a GPU: that reads values, whose result's size is in the values,
    or that makes a tensor of the host's numbers by a copy that blocks.

    On the CPU `tolist` and `numpy` pass the dispatcher by, and a blocking copy is none: these are logged by name.
    """

    operations = frozenset(
        ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique", "_unique2", "unique_dim")
    )
    methods = ("tolist", "numpy", "cpu", "new_tensor")
    functions = ("tensor", "as_tensor")

    def __init__(self, log):
        super().__init__()
        self.log = log

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name, overload = function._schema.name.removeprefix("aten::"), function._schema.overload_name
        by_mask = name in ("index", "index_put", "index_put_", "_index_put_impl_") and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        # A scalar is put by a mask as `masked_fill` does.
        by_mask = by_mask and not (name != "index" and args[2].numel() == 1)
        if name in self.operations or by_mask or (name == "repeat_interleave" and overload == "Tensor"):
            self.log.append(name)
        return function(*args, **(kwargs or {}))

    def __enter__(self):
        self.patch = pytest.MonkeyPatch()
        for owner, names in ((torch.Tensor, self.methods), (torch, self.functions)):
            for name in names:
                self.patch.setattr(owner, name, self.logged(name, getattr(owner, name), owner is torch))
        return super().__enter__()

    def __exit__(self, *error):
        self.patch.undo()
        return super().__exit__(*error)

    def logged(self, name, call, makes):
        def method(*args, **kwargs):
            result = call(*args, **kwargs)
            # Made where the host's numbers are, or of none, or of a tensor that is there already: nothing to wait for.
            if not makes or (
                kwargs.get("device") not in (None, "cpu") and result.numel() and not torch.is_tensor(args[0])
            ):
                self.log.append(name)
            return result

        return method
