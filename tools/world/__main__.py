"""Write the corpus of `tiny` as JSONL: plain texts in one file, conversations in another.

python -m tools.world world --documents 65000
lmtune pretrain pretrain_tiny data.path=world
"""

import argparse
import json
from pathlib import Path

from tools.world.world import world

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write the small world that the embedded model is pretrained on.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--documents", type=int, default=65_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    with (options.folder / "texts.jsonl").open("w") as texts, (options.folder / "chats.jsonl").open("w") as chats:
        for document in world(options.documents, options.seed):
            if isinstance(document, str):
                texts.write(json.dumps({"text": document}) + "\n")
            else:
                chats.write(json.dumps({"messages": [turn._asdict() for turn in document]}) + "\n")
