"""Words that describe the raw shapes which many data sets share."""

from __future__ import annotations

LLAVA = 'an array of {"id", "image": path, "conversations": [{"from": human or gpt, "value"}]}'
CAULDRON = 'parquet rows {"images": [image], "texts": [{"user", "assistant", "source"}]}'

CAULDRON_CARD = "dataset card of The Cauldron"
CAULDRON_LICENCE = "Cauldron prompts: CC-BY-4.0"
