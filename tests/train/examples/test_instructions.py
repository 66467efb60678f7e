"""The example of context distillation: its settings are read, and its records share their system prompt."""

from pathlib import Path

from disc_train.config import parse_arguments
from disc_train.data.contexts import load_records
from disc_train.packing.collator import pack

ROOT = Path(__file__).parents[3]


def test_the_records_are_read_and_share_their_instructions(chat_tokenizer):
    disc, _ = parse_arguments([str(ROOT / "examples" / "instructions" / "disc.yaml"), "--use_cpu", "--bf16=false"])
    assert disc.method == "cd"
    records = load_records(str(ROOT / disc.train_file[0]), None, chat_tokenizer)
    batch = pack(records)
    assert int((batch["teacher_layout"].position_ids == 0).sum()) == 1
    assert batch["packing"].saving > 1.5
