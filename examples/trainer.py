"""Fine-tune a SOLO model with transformers' Trainer on packed sequences; a restarted run resumes.

    python examples/trainer.py --model MODEL --data MIXTURE.yaml --out runs/trainer --steps 1000

With several processes: torchrun --nproc-per-node 8 examples/trainer.py ...
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from solo_vlm.data.loader import PackedLoader
from solo_vlm.data.mixture import Mixture, make_loader
from solo_vlm.models.load import load_model, load_processor
from solo_vlm.models.packed.isolation import isolate_documents


class PackedTrainer(Trainer):
    """Trainer for a loader that packs sequences and splits them among processes itself."""

    def __init__(self, loader: PackedLoader, **options: Any) -> None:
        super().__init__(**options)
        self.loader = loader
        self.add_callback(SaveLoader(loader))

    def get_train_dataloader(self) -> PackedLoader:
        return self.loader  # not prepared by Accelerate, which would split it again

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        state = Path(resume_from_checkpoint) / _loader_file(self.args)
        self.loader.load_state_dict(json.loads(state.read_text()))


class SaveLoader(TrainerCallback):
    """Callback that saves the loader state of each process with the checkpoint."""

    def __init__(self, loader: PackedLoader) -> None:
        self.loader = loader

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        (folder / _loader_file(args)).write_text(json.dumps(self.loader.state_dict()))


def _loader_file(args: TrainingArguments) -> str:
    return f"loader_rank{args.process_index}.json"


def main(
    model: Annotated[Path, typer.Option(help="Folder of a SOLO model.")],
    data: Annotated[str, typer.Option(help="YAML file of a mixture or recipe.")],
    out: Annotated[Path, typer.Option(help="Folder for checkpoints and the trained model.")],
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 1000,
    batch: Annotated[int, typer.Option(help="Packed sequences per step and process.")] = 8,
    learning_rate: float = 1e-5,
) -> None:
    """Fine-tune a SOLO model with transformers' Trainer."""
    args = TrainingArguments(
        output_dir=str(out),
        max_steps=steps,
        per_device_train_batch_size=1,  # one packed sequence
        gradient_accumulation_steps=batch,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.03,  # fraction of the steps
        weight_decay=0.1,
        bf16=torch.cuda.is_available(),
        use_cpu=not torch.accelerator.is_available(),  # otherwise CPU processes form no group
        logging_steps=1,
        save_steps=max(1, steps // 10),
        ignore_data_skip=True,  # the loader resumes by itself
        report_to="none",
    )
    processor = load_processor(model)
    mixture = Mixture.load(data, [f"model={model}"])
    if mixture.data.epochs:  # the loaders of the processes would end at different steps
        raise typer.BadParameter(f"{data}: remove data.epochs; --steps sets the length of the run")
    solo = load_model(model, dtype="float32")
    isolate_documents(solo)  # no (length, length) mask
    loader = make_loader(mixture, processor, mixture.open_sources(), args.process_index, args.world_size)
    trainer = PackedTrainer(loader, model=solo, args=args)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(out)) if out.is_dir() else None)
    trainer.save_model(str(out / "model"))
    processor.save_pretrained(out / "model")


if __name__ == "__main__":
    typer.run(main)
