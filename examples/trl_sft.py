"""Fine-tune a SOLO model with TRL's SFTTrainer on chats in parquet files, optionally with LoRA.

    python examples/trl_sft.py --model MODEL --data "chats/*.parquet" --out runs/trl --steps 1000 --lora

A row has OpenAI-style `messages` and any number of `images`; see docs/data.md.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from datasets import load_dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

from solo_vlm.data.collate import PackedBatch, collate
from solo_vlm.data.encode import encode
from solo_vlm.data.sample import parse_sample
from solo_vlm.models.load import load_model, load_processor
from solo_vlm.models.packed.isolation import isolate_documents
from solo_vlm.models.solo.processing_solo import SoloProcessor


class PackedCollator:
    """Collator that encodes rows and concatenates them without padding or attention between documents."""

    def __init__(self, processor: SoloProcessor) -> None:
        self.processor = processor

    def __call__(self, rows: list[dict[str, Any]]) -> PackedBatch:
        documents = [encode(parse_sample(row), self.processor) for row in rows]
        return collate(documents, sum(map(len, documents)), self.processor.tokenizer.pad_token_id)


def main(
    model: Annotated[Path, typer.Option(help="Folder of a SOLO model.")],
    data: Annotated[str, typer.Option(help="Path or pattern of parquet files.")],
    out: Annotated[Path, typer.Option(help="Folder for checkpoints and the trained model.")],
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 1000,
    batch: Annotated[int, typer.Option(help="Packs of eight chats per step and process.")] = 2,
    learning_rate: float = 1e-5,
    lora: Annotated[bool, typer.Option("--lora", help="Train LoRA adapters instead of the decoder.")] = False,
) -> None:
    """Fine-tune a SOLO model with TRL's SFTTrainer."""
    args = SFTConfig(
        output_dir=str(out),
        max_steps=steps,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=batch,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.03,  # fraction of the steps
        weight_decay=0.1,
        bf16=torch.cuda.is_available(),
        logging_steps=1,
        save_steps=max(1, steps // 10),
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},  # the collator reads raw rows
        remove_unused_columns=False,
        report_to="none",
    )
    processor = load_processor(model)
    solo = load_model(model, dtype="float32")
    isolate_documents(solo)
    adapters = LoraConfig(
        r=16,
        lora_alpha=32,
        target_modules="all-linear",
        exclude_modules=["embed_vision_patch"],
        modules_to_save=["embed_vision_patch"],
    )
    trainer = SFTTrainer(
        model=solo,
        args=args,
        train_dataset=load_dataset("parquet", data_files=data, split="train"),
        data_collator=PackedCollator(processor),
        processing_class=processor,
        peft_config=adapters if lora else None,
    )
    trainer.train()
    trained = trainer.model.merge_and_unload() if lora else trainer.model
    trained.save_pretrained(out / "model")
    processor.save_pretrained(out / "model")


if __name__ == "__main__":
    typer.run(main)
