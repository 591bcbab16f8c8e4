"""Answers to one prompt about every image of a folder; an interrupted run resumes where it stopped."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from solo_vlm.data.values import natural_key
from solo_vlm.generate.pipeline import BatchGenerator, GenerationPipeline, GenerationRequest, user_turn
from solo_vlm.models.solo.image_loading_solo import ImageError, image_suffixes, load_image
from solo_vlm.utils.errors import SoloError
from solo_vlm.utils.files import new_file
from solo_vlm.utils.json_lines import LinesFile, json_line


@dataclass(frozen=True)
class FolderCounts:
    """Number of records in the finished output file.

    Attributes:
        answers: Answered images, earlier runs included.
        errors: Images that could not be read or answered.
        new: Records added by this run.
    """

    answers: int
    errors: int
    new: int


def answer_folder(
    pipeline: GenerationPipeline,
    images: list[str],
    folder: Path,
    request: dict[str, Any],
    out: Path,
    batch_size: int = 8,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> FolderCounts:
    """Answer the same prompt about every image; write one line `{"image", "answer", **request}` per image.

    A line has "error" instead of "answer" if the image cannot be read or exceeds the model's context. Lines
    are appended batch by batch and put in the order of `images` at the end. Images that the file already
    lists are skipped.

    Args:
        images: Names relative to the folder, see `find_images`.
        request: `prompt`, `max_new_tokens`, and any other values to repeat on each line.
        out: JSON Lines file to create or complete.
        on_progress: Called with the completed and the total number of images.

    Raises:
        SoloError: `out` is another kind of file, or answers a different request.
    """
    with LinesFile(out) as file:
        records = {record.get("image"): record for record in file.records}
        before = len(records)
        _check_same_request(request, records, out)
        pending = [name for name in images if name not in records]
        unreadable: deque[dict[str, Any]] = deque()

        def requests() -> Iterator[GenerationRequest]:
            for number, name in enumerate(pending):
                try:
                    messages = [user_turn(request["prompt"], [load_image(folder / name, name=name)])]
                except ImageError as error:
                    unreadable.append({"image": name, "error": str(error), **request})
                else:
                    yield GenerationRequest(number, messages, request["max_new_tokens"])

        def save(new: list[dict[str, Any]]) -> None:
            while unreadable:  # another thread may append meanwhile
                new.append(unreadable.popleft())
            file.append(new)
            records.update({record["image"]: record for record in new})
            on_progress(len(records), len(images))

        for outputs in BatchGenerator(pipeline, batch_size).generate(requests()):
            save(
                [
                    {
                        "image": pending[output.request_id],
                        **({"error": output.error} if output.error else {"answer": output.text}),
                        **request,
                    }
                    for output in outputs
                ]
            )
        save([])
    ordered = [records[name] for name in images]
    with new_file(out) as partial:
        partial.write_bytes(b"".join(map(json_line, ordered)))
    errors = sum("error" in record for record in ordered)
    return FolderCounts(len(ordered) - errors, errors, len(records) - before)


def find_images(folder: Path) -> list[str]:
    """Return the relative names of all image files below a folder, in natural order (img2 before img10).

    Hidden files and folders are skipped; an image is recognized by its suffix.

    Raises:
        SoloError: The folder has no images.
    """
    suffixes = image_suffixes()
    names = [
        path.relative_to(folder)
        for path in folder.rglob("*")
        if path.suffix.lower() in suffixes and path.is_file()
    ]
    visible = [name.as_posix() for name in names if not any(part.startswith(".") for part in name.parts)]
    if not visible:
        raise SoloError(f"there are no images in {folder}")
    return sorted(visible, key=natural_key)


def _check_same_request(request: dict[str, Any], records: dict[Any, dict[str, Any]], out: Path) -> None:
    for record in records.values():
        for name, value in request.items():
            if record.get(name) != value:
                raise SoloError(
                    f"{out} has answers to another request ({name} {record.get(name)!r}, now {value!r}): "
                    "choose another name or remove the file"
                )
