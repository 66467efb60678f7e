"""YAML files of flags: what is read, what wins, and what is refused in which words."""

import pytest
import yaml

from disc_train.config import parse_arguments
from disc_train.flags import _read_yaml

REQUIRED = ["--model_name_or_path", "m", "--train_file", "f.jsonl", "--output_dir", "o", "--use_cpu", "true"]


@pytest.fixture
def write_yaml(tmp_path):
    def write(text):
        path = tmp_path / "config.yaml"
        path.write_text("model_name_or_path: m\ntrain_file: f.jsonl\noutput_dir: o\nuse_cpu: true\n" + text)
        return str(path)

    return write


def test_yaml_values_are_read_as_flags_are(write_yaml):
    disc, loop = parse_arguments(
        [
            write_yaml(
                "learning_rate: 3e-5\ntemperature: 1\nbf16: false\nmax_document_tokens: null\nlr_scheduler_type:"
                " cosine_with_restarts\nlr_scheduler_kwargs: {num_cycles: 2}\nreport_to: [none]\nsave_strategy: 'no'\n"
            )
        ]
    )
    assert loop.learning_rate == 3e-5
    assert disc.temperature == 1.0
    assert disc.max_document_tokens is None
    assert loop.lr_scheduler_kwargs == {"num_cycles": 2}
    assert loop.save_strategy == "no"


def test_yaml_switches_of_flags_that_are_texts(write_yaml):
    """`fsdp` and `resume_from_checkpoint` also take texts, so that true and false arrive as words."""
    _, loop = parse_arguments([write_yaml("fsdp: true\nfsdp_config: {version: 2}\nresume_from_checkpoint: true\n")])
    assert (loop.fsdp, loop.fsdp_config["version"], loop.resume_from_checkpoint) == (True, 2, "true")
    _, loop = parse_arguments([write_yaml("fsdp: false\nresume_from_checkpoint: false\n")])
    assert not loop.fsdp and loop.resume_from_checkpoint is None
    with pytest.raises(ValueError, match="--fsdp_config needs --fsdp, got it without"):
        parse_arguments([write_yaml("fsdp: false\nfsdp_config: {version: 2}\n")])


def test_flags_win_over_the_file(write_yaml):
    disc, loop = parse_arguments(
        [write_yaml("num_splits: 2\nseed: 7\n"), "--num_splits", "3", "--learning-rate", "1e-4"]
    )
    assert (disc.num_splits, loop.seed, loop.learning_rate) == (3, 7, 1e-4)
    disc, loop = parse_arguments(["--num_splits", "3", "--config", write_yaml("num_splits: 2\nseed: 7\n")])
    assert (disc.num_splits, loop.seed) == (3, 7)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tempature: 2\n", "config.yaml: unknown key tempature; did you mean temperature?"),
        ("- a\n", "config.yaml: expected a readable YAML file"),
        ("\x00", "config.yaml: expected a readable YAML file"),
        ("seed: 1\nseed: 2\n", "config.yaml: expected a readable YAML file, got: the key seed a second time"),
        ("seed: [1, 2]\n", r"config.yaml: seed: expected one value, got the list \[1, 2\]"),
        ("freeze_head: []\n", r"config.yaml: freeze_head: expected one value, got the list \[\]"),
        ("fsdp_config: {a: 1, a: 2}\n", "got: the key a a second time"),
    ],
)
def test_a_bad_file_is_named(text, message, write_yaml):
    with pytest.raises(ValueError, match=message):
        parse_arguments([write_yaml(text)])


def test_a_key_may_stand_in_what_a_mapping_takes_over_and_in_itself(tmp_path):
    """YAML's `<<` is no repetition: as yaml.safe_load reads it, at any depth."""
    text = "a: &a {x: 1}\nouter:\n  inner: &b\n    <<: *a\n    x: 2\nd:\n  <<: *b\n  z: 3\n"
    (tmp_path / "merged.yaml").write_text(text)
    assert _read_yaml(tmp_path / "merged.yaml") == yaml.safe_load(text)


def test_a_missing_or_empty_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"no\.yaml: expected a readable YAML file"):
        parse_arguments([str(tmp_path / "no.yaml")])
    (tmp_path / "empty.yaml").touch()
    with pytest.raises(ValueError, match=r"empty\.yaml: expected 'flag: value' lines, got NoneType"):
        parse_arguments([str(tmp_path / "empty.yaml")])


def test_several_files_behind_one_flag_or_several(write_yaml):
    def read(*flags):
        return parse_arguments([write_yaml("replay_file: [r.txt, s.txt]\n"), *flags])[0]

    assert (read().train_file, read().replay_file) == (["f.jsonl"], ["r.txt", "s.txt"])
    disc = read("--train_file", "a", "b", "--train-file=c", "--replay_file", "d")
    assert (disc.train_file, disc.replay_file) == (["a", "b", "c"], ["d"])
