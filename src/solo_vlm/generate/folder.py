"""One prompt about every image of a folder, answered into a file that a later run completes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from solo_vlm.data.text_values import natural_key
from solo_vlm.generate.pipeline import BatchGenerator, GenerationPipeline, GenerationRequest, user_turn
from solo_vlm.models.solo.image_loading_solo import ImageError, image_suffixes, load_image
from solo_vlm.utils.errors import SoloError
from solo_vlm.utils.files import new_file
from solo_vlm.utils.json_lines import LinesFile, json_line


@dataclass(frozen=True)
class FolderCounts:
    """What the file of answers holds in the end.

    Attributes:
        answers: images that were answered about, in earlier runs too.
        errors: images that could not be.
        new: of both, those of this run.
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
    """Ask the same about every image, and write `{"image": ..., "answer": ..., **request}` a line.

    An image that cannot be read, or does not fit into the model's context, has "error" in place of "answer".
    Lines are added batch by batch; once all are there, they are put in the order of `images`. Images that the
    file has already, from a run that was killed, are not asked about again.

    Args:
        pipeline: the model.
        images: names in the folder, see `find_images`.
        folder: where they lie.
        request: `prompt`, `max_new_tokens`, and whatever else a line shall tell.
        out: JSON lines.
        batch_size: images that are answered about together.
        on_progress: called with the images done and all.

    Raises:
        SoloError: `out` holds something else, or answers to another request.
    """
    with LinesFile(out) as file:
        records = {record.get("image"): record for record in file.records}
        before = len(records)
        _check_same(request, records, out)
        waiting = [name for name in images if name not in records]
        faults: deque[tuple[str, str]] = deque()

        def requests() -> Iterator[GenerationRequest]:
            for number, name in enumerate(waiting):
                try:
                    chat = [user_turn(request["prompt"], [load_image(folder / name, name=name)])]
                except ImageError as error:
                    faults.append((name, str(error)))
                else:
                    yield GenerationRequest(number, chat, request["max_new_tokens"])

        def save(new: list[dict[str, Any]]) -> None:
            while faults:
                name, error = faults.popleft()
                new.append({"image": name, "error": error, **request})
            file.append(new)
            records.update({record["image"]: record for record in new})
            on_progress(len(records), len(images))

        for answers in BatchGenerator(pipeline, batch_size).generate(requests()):
            save(
                [
                    {
                        "image": waiting[answer.request_id],
                        **({"error": answer.error} if answer.error else {"answer": answer.text}),
                        **request,
                    }
                    for answer in answers
                ]
            )
        save([])
    ordered = [records[name] for name in images]
    with new_file(out) as partial:
        partial.write_bytes(b"".join(map(json_line, ordered)))
    errors = sum("error" in record for record in ordered)
    return FolderCounts(len(ordered) - errors, errors, len(records) - before)


def find_images(folder: Path) -> list[str]:
    """Names of the image files in a folder and those below it, in natural order (img2 before img10).

    What is hidden is left out, and so is what has no ending of an image format.

    Raises:
        SoloError: there is none.
    """
    endings = image_suffixes()
    names = [
        path.relative_to(folder)
        for path in folder.rglob("*")
        if path.suffix.lower() in endings and path.is_file()
    ]
    shown = [name.as_posix() for name in names if not any(part.startswith(".") for part in name.parts)]
    if not shown:
        raise SoloError(f"there are no images in {folder}")
    return sorted(shown, key=natural_key)


def _check_same(request: dict[str, Any], records: dict[Any, dict[str, Any]], out: Path) -> None:
    for record in records.values():
        for name, value in request.items():
            if record.get(name) != value:
                raise SoloError(
                    f"{out} holds answers of another request ({name} {record.get(name)!r}, now {value!r}): "
                    "choose another name or remove it"
                )
