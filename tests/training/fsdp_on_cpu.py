"""`learnpruner` over processes of a CPU that share the base's layers (FSDP2).

accelerate offers FSDP on accelerators alone, though PyTorch's runs on any device: here its processes pass for GPUs'.
"""

import sys

from accelerate import PartialState
from accelerate.utils import DistributedType

from learnpruner_commands import main

plain_init = PartialState.__init__


def init(self, *args, **kwargs):
    plain_init(self, *args, **kwargs)
    if self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_GPU


PartialState.__init__ = init
sys.exit(main(sys.argv[1:]))
