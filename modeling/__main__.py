# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
import sys

from learnpruner_commands import main

# Processes that a data loader spawns import this file, and are not to run the command.
if __name__ == "__main__":
    sys.exit(main())
