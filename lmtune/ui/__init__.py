"""Talking to a model: in the terminal (`terminal`), and in the browser (`page`, `conversation`, `server`)."""

import os

# Gradio reads this when it is used: no word about anyone's use of the app leaves the machine.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
