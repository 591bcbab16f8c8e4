"""The data sets by name."""

from __future__ import annotations

import difflib

from solo_vlm.data.catalog.entry import DataSet
from solo_vlm.data.catalog.finetuning import FINETUNING
from solo_vlm.data.catalog.pretraining import PRETRAINING
from solo_vlm.utils.errors import SoloError

DATA_SETS = {data_set.name: data_set for data_set in (*PRETRAINING, *FINETUNING)}


def get(name: str) -> DataSet:
    """The data set of a name.

    Raises:
        SoloError: there is none; the message has the nearest one.
    """
    if name in DATA_SETS:
        return DATA_SETS[name]
    near = difflib.get_close_matches(name, DATA_SETS, n=1)
    hint = f": did you mean {near[0]}?" if near else ""
    raise SoloError(f"no data set {name} in the catalog{hint} (solo data list shows all)")
