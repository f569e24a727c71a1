"""What a launcher starts here in place of recipes/finetune.py: the same, with trouble for one process.

TROUBLE is a pickled trouble in hexadecimal digits, RANK_IN_TROUBLE the process that has it.
"""

import os
import pickle

from lmtune.recipes.finetune import main
from lmtune.run import run

if os.environ.get("RANK") == os.environ["RANK_IN_TROUBLE"]:
    pickle.loads(bytes.fromhex(os.environ["TROUBLE"]))()
run(main)
