"""Images in tar files, named by their class: `n01440764_10026.jpg`; a list gives the names of classes."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from solo_vlm.data.catalog.entry import RawRow, SampleRow
from solo_vlm.data.catalog.raw_folder import RawFolder
from solo_vlm.data.catalog.rows import document, field, image_member
from solo_vlm.data.sample import SampleError
from solo_vlm.utils.errors import SoloError

CLASS_LIST = "mapping.txt"


def class_name(row: RawRow, folder: RawFolder) -> SampleRow:
    """A document of the image and the name of its class."""
    key = str(field(row, "key"))
    class_id = key.split("_")[0]
    names = _class_names(folder.root)
    if class_id not in names:
        raise SampleError("class-unknown", f"{class_id} is not in {CLASS_LIST}")
    return document(names[class_id], [folder.image(image_member(row))], key)


@lru_cache(maxsize=1)
def _class_names(root: Path) -> dict[str, str]:
    """Lines of an id and a name; of several names, separated by commas, the first counts."""
    path = root / CLASS_LIST
    if not path.is_file():
        raise SoloError(f"{path} is missing: lines of a WordNet id and a name, such as 'n01440764 tench'")
    lines = path.read_text(encoding="utf-8").splitlines()
    pairs = [line.split(maxsplit=1) for line in lines if len(line.split(maxsplit=1)) == 2]
    return {id: name.split(",")[0].replace("_", " ").replace("-", " ") for id, name in pairs}
