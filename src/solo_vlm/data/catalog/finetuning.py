"""The 32 data sets of instruction fine-tuning, and the release's one file of all of them."""

from __future__ import annotations

from solo_vlm.data.catalog import captions, cauldron, language, llava
from solo_vlm.data.catalog.entry import DataSet
from solo_vlm.data.catalog.shapes import CAULDRON, CAULDRON_CARD, CAULDRON_LICENCE, LLAVA

_LANGUAGE = "language only"
_CAPTIONS = "detailed captions"
_SCIENCE = "science"
_CHARTS = "tables, documents, charts"
_OCR = "OCR"
_GENERAL = "general VQA"

_OWN_TERMS = "own terms, see its source (unchecked)"


def _of_cauldron(
    name: str, title: str, config: str, group: str, samples: int, licence: str = _OWN_TERMS, note: str = ""
) -> DataSet:
    """A part of The Cauldron, which is where the release took its visual instructions from."""
    return DataSet(
        name=name,
        title=title,
        source=f"HuggingFaceM4/the_cauldron:{config}",
        licence=f"{title}: {licence}; {CAULDRON_LICENCE}",
        raw_schema=CAULDRON,
        schema_confirmed=True,
        evidence=CAULDRON_CARD,
        files=("*.parquet",),
        convert=cauldron.chat,
        group=group,
        samples=samples,
        note=note,
    )


def _subset(part: str) -> str:
    return f"The Cauldron has {part} rows, the paper took a part of them: choose it in the mixture."


FINETUNING = (
    DataSet(
        name="codeact-general",
        title="CodeAct-General",
        source="xingyaoww/code-act:general",
        licence="Apache-2.0 (unchecked)",
        raw_schema='parquet rows {"id", "conversations": [{"role", "content"}]}',
        schema_confirmed=True,
        evidence="dataset card; split general has 71,246 rows",
        files=("general-*.parquet",),
        convert=language.chat("conversations", "id"),
        group=_LANGUAGE,
        samples=71_000,
    ),
    DataSet(
        name="ultrainteract",
        title="UltraInteract-SFT",
        source="openbmb/UltraInteract_sft",
        licence="MIT",
        raw_schema='rows {"task", "dataset", "instruction", "response", "id", "parent_id"}, JSON or parquet',
        schema_confirmed=True,
        evidence="dataset card; 288,579 rows",
        files=("*.parquet", "ultrainteract_sft.json"),
        convert=language.instruction,
        group=_LANGUAGE,
        samples=288_000,
    ),
    DataSet(
        name="ultrachat",
        title="UltraChat",
        source="HuggingFaceH4/ultrachat_200k:train_sft",
        licence="MIT (unchecked)",
        raw_schema='parquet rows {"prompt", "prompt_id", "messages": [{"role", "content"}]}',
        schema_confirmed=True,
        evidence="dataset card; split train_sft has 207,865 rows",
        files=("train_sft-*.parquet",),
        convert=language.chat("messages", "prompt_id"),
        group=_LANGUAGE,
        samples=207_000,
    ),
    DataSet(
        name="lvis-instruct4v",
        title="LVIS-Instruct4V",
        source="X2FD/LVIS-Instruct4V:lvis_instruct4v_220k.json",
        licence="not stated on the card; images: COCO's terms",
        raw_schema=f"{LLAVA}; images of COCO below coco/",
        schema_confirmed=True,
        evidence="scripts that mix it into LLaVA's data, the release's authors' among them; 223K rows",
        files=("lvis_instruct4v_220k.json",),
        convert=llava.chat,
        group=_CAPTIONS,
        samples=223_000,
    ),
    DataSet(
        name="sharegpt4v",
        title="ShareGPT4V",
        source="Lin-Chen/ShareGPT4V:sharegpt4v_instruct_gpt4-vision_cap100k.json",
        licence="CC-BY-NC-4.0",
        raw_schema=f"{LLAVA}; images below coco/, llava/, sam/, share_textvqa/, web-celebrity/, wikiart/ ...",
        schema_confirmed=True,
        evidence="the release's authors read it with their loader of LLaVA rows; guides to its folders",
        files=("sharegpt4v_instruct_gpt4-vision_cap100k.json",),
        convert=llava.chat,
        group=_CAPTIONS,
        samples=102_000,
    ),
    DataSet(
        name="laion-gpt4v",
        title="LAION-GPT4V",
        source="laion/gpt4v-dataset",
        licence="CC0-1.0; images have terms of their own",
        raw_schema='parquet rows {"caption", "link", "message_id", "timestamp"}, in some "image" too',
        schema_confirmed=True,
        evidence="dataset card",
        files=("*.parquet",),
        convert=captions.answered_request("link", "caption", "message_id"),
        group=_CAPTIONS,
        samples=12_000,
        note="A link stays a URL. The request that the release puts before a caption is not published.",
    ),
    _of_cauldron(
        "localized-narratives",
        "Localized Narratives",
        "localized_narratives",
        _CAPTIONS,
        200_000,
        "CC-BY-4.0 (unchecked)",
    ),
    _of_cauldron("vsr", "VSR", "vsr", _CAPTIONS, 2_000, "Apache-2.0 (unchecked)"),
    _of_cauldron("tqa", "TQA", "tqa", _SCIENCE, 2_000),
    _of_cauldron("scienceqa", "ScienceQA", "scienceqa", _SCIENCE, 5_000, "CC-BY-NC-SA-4.0 (unchecked)"),
    _of_cauldron("iconqa", "IconQA", "iconqa", _CHARTS, 27_000, "CC-BY-NC-SA-4.0"),
    _of_cauldron("tabmwp", "TabMWP", "tabmwp", _CHARTS, 23_000, "CC-BY-NC-SA-4.0 (unchecked)"),
    _of_cauldron("chartqa", "ChartQA", "chartqa", _CHARTS, 18_000, "GPL-3.0 (unchecked)"),
    _of_cauldron(
        "vistext", "VisText", "vistext", _CHARTS, 7_000, "GPL-3.0 (unchecked)", note=_subset("9.97K")
    ),
    _of_cauldron("chart2text", "Chart2Text", "chart2text", _CHARTS, 27_000, "GPL-3.0 (unchecked)"),
    _of_cauldron(
        "dvqa-sft", "DVQA", "dvqa", _CHARTS, 20_000, "CC-BY-NC-4.0 (unchecked)", note=_subset("200K")
    ),
    _of_cauldron(
        "figureqa-sft",
        "FigureQA",
        "figureqa",
        _CHARTS,
        20_000,
        "Microsoft's own (unchecked)",
        note=_subset("100K"),
    ),
    _of_cauldron("diagram-image-to-text", "Diagram Image-to-Text", "diagram_image_to_text", _OCR, 300),
    _of_cauldron("infographicvqa", "InfographicVQA", "infographic_vqa", _OCR, 2_000),
    _of_cauldron("st-vqa", "ST-VQA", "st_vqa", _OCR, 17_000, "CC-BY-4.0 (unchecked)"),
    _of_cauldron("textcaps", "TextCaps", "textcaps", _OCR, 22_000, "CC-BY-4.0 (unchecked)"),
    _of_cauldron("textvqa", "TextVQA", "textvqa", _OCR, 22_000, "CC-BY-4.0 (unchecked)"),
    _of_cauldron(
        "ocr-vqa-sft", "OCR-VQA", "ocrvqa", _OCR, 17_000, "not stated (unchecked)", note=_subset("166K")
    ),
    _of_cauldron("rendered-text", "Rendered-Text", "rendered_text", _OCR, 10_000),
    _of_cauldron("hateful-memes", "HatefulMemes", "hateful_memes", _GENERAL, 8_500),
    _of_cauldron(
        "okvqa",
        "OK-VQA",
        "okvqa",
        _GENERAL,
        9_000,
        "CC-BY-4.0 (unchecked)",
        note="The hub's parquet files of this part are too small to hold images. Rows that only carry a path "
        "need COCO's images in the raw folder, else they are rejected (image-missing).",
    ),
    _of_cauldron("aokvqa", "A-OKVQA", "aokvqa", _GENERAL, 16_500, "Apache-2.0 (unchecked)"),
    _of_cauldron("tallyqa", "TallyQA", "tallyqa", _GENERAL, 100_000, "Apache-2.0 (unchecked)"),
    _of_cauldron("visual7w", "Visual7W", "visual7w", _GENERAL, 14_000, "MIT (unchecked)"),
    _of_cauldron("cocoqa", "COCO-QA", "cocoqa", _GENERAL, 46_000, "CC-BY-4.0 (unchecked)"),
    _of_cauldron("vqav2", "VQAv2", "vqav2", _GENERAL, 82_000, "CC-BY-4.0 (unchecked)"),
    DataSet(
        name="gqa",
        title="GQA",
        source="liuhaotian/LLaVA-Instruct-150K:llava_v1_5_mix665k.json",
        licence="GQA: CC-BY-4.0 (unchecked); the mixture: CC-BY-4.0 (unchecked)",
        raw_schema=f"{LLAVA}; images of GQA below gqa/images/",
        schema_confirmed=True,
        evidence="rows shown in guides to LLaVA's mixture, whose share of GQA is 72K; the release's authors "
        "read it with their loader of LLaVA rows",
        files=("llava_v1_5_mix665k.json",),
        convert=llava.within("gqa/", llava.chat),
        group=_GENERAL,
        samples=72_000,
        note="The rest of the mixture is rejected (other-data-set).",
    ),
    DataSet(
        name="release-sft",
        title="the release's fine-tuning data",
        source="YangyiYY/VLM-SFT:all_data.jsonl",
        licence="those of the data sets in it",
        raw_schema='JSON lines {"image": relative path, absent for text, "conversations": [{"from", "value"} '
        "or a bare string]}, with <image> anywhere in a turn",
        schema_confirmed=True,
        evidence="the release's own loader and guide",
        files=("all_data.jsonl",),
        convert=llava.chat,
        group="all of fine-tuning",
        note="Holds all other fine-tuning sets: use it, or them. Convert it only to take its images in.",
    ),
)
