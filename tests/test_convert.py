"""`python -m nano_moca.convert`: the published forms of stage 2's data, in miniature."""

import io
import json
import os
import tarfile
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from nano_moca import MARK, Moca, MocaError
from nano_moca.batches import PairBatches
from nano_moca.data import load_tasks

parquet = pytest.importorskip("pyarrow.parquet")
pyarrow = pytest.importorskip("pyarrow")

from nano_moca.convert.__main__ import Flags, convert, read_list

I1 = "<|image_1|>"


def picture(color: str = "red") -> bytes:
    """A small PNG."""
    file = io.BytesIO()
    Image.new("RGB", (56, 56), color).save(file, "PNG")
    return file.getvalue()


def row(**more: object) -> dict:
    """A published row: a text query that finds an image."""
    return {"qry": "Find it: a cat.\n", "qry_image_path": "",
            "pos_text": f"{I1}\nRepresent the given image.\n",
            "pos_image_path": "images/COCO/a.png", "neg_text": "[]", "neg_image_path": "[]",
            **more}


def write(path: Path, rows: list[dict], **how: object) -> Path:
    """A parquet file of a subset."""
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, **how)
    return path


def lines(path: Path) -> list[dict]:
    """A JSON lines file's."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder images/ with some pictures."""
    folder = tmp_path / "published" / "images"
    for name, color in (("COCO/a.png", "red"), ("COCO/b.png", "blue"), ("docs/p.png", "white")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(picture(color))
    return folder


def run(tmp_path: Path, data: Path | str, images: Path | str | None = None, **more: str) -> Path:
    """Convert into tmp_path/pairs, or the output that is named."""
    output = more.pop("output", str(tmp_path / "pairs"))
    images = None if images is None else str(images)
    convert(Flags(**{"data": str(data), "output": output, "images": images,
                     "kinds": None, "on_error": "stop", **more}))
    return Path(output)


def test_rows_become_lines(tmp_path: Path, pictures: Path, capsys: pytest.CaptureFixture) -> None:
    """Marks, paths, negatives in a list and alone, instructions and their line ends; what comes
    out trains, and the pictures are those of the links."""
    data = tmp_path / "data"
    write(data / "MSCOCO_t2i" / "train-00000-of-00001.parquet", [
        row(neg_text=repr([f"{I1}\nRepresent the given image.\n", ""]),
            neg_image_path=repr(["images/COCO/b.png", "images/docs/p.png"])),
        row(qry=f"{I1}a stray mark goes\n", neg_text="['', '']", neg_image_path="['', '']")])
    write(data / "TAT-DQA" / "train-00000-of-00001.parquet", [
        row(qry="Which sum?\n", pos_text=f"{I1}\npage", pos_image_path="images/docs/p.png",
            neg_text="plain words, no list", neg_image_path=None),
        row(qry=f"{I1}What is it?\n", qry_image_path="COCO/a.png", pos_text="a cat",
            pos_image_path="", neg_text="['a dog', None]", neg_image_path="[]")])
    output = run(tmp_path, data, pictures)

    first, second = lines(output / "MSCOCO_t2i.jsonl")
    asked = f"{MARK}\nRepresent the given image.\n"
    assert first == {
        "task": "MSCOCO_t2i", "kind": "image-text", "query": {"text": "Find it: a cat.\n"},
        "positive": {"text": asked, "images": ["images/COCO/a.png"]},
        "negatives": [{"text": asked, "images": ["images/COCO/b.png"]},
                      {"text": asked, "images": ["images/docs/p.png"]}]}
    assert second["query"] == {"text": "a stray mark goes\n"} and second["negatives"] == []
    third, fourth = lines(output / "TAT-DQA.jsonl")
    assert third["kind"] == "long-document"
    assert third["negatives"] == [{"text": "plain words, no list"}]
    assert fourth["query"] == {"text": f"{MARK}What is it?\n", "images": ["images/COCO/a.png"]}
    assert fourth["negatives"] == [{"text": "a dog"}]
    assert (output / "images" / "COCO").is_symlink(), "pictures are not copied"
    assert "MSCOCO_t2i: 2 pairs" in capsys.readouterr().out

    tasks = load_tasks(str(output), 0)
    assert {name: (len(task), task.kind) for name, task in tasks.items()} == {
        "MSCOCO_t2i": (2, "image-text"), "TAT-DQA": (2, "long-document")}
    assert tasks["TAT-DQA"][0].positive.images[0].read_bytes() == picture("white")


@pytest.mark.parametrize("kind", ["zip", "gz", "inner", "tar"])
def test_pictures_from_archives(tmp_path: Path, moca: Moca, kind: str) -> None:
    """A zip or tar file, or a folder of them, with images/ at its top or without."""
    top = "images/" if kind == "inner" else ""
    data = write(tmp_path / "d" / "NIGHTS" / "original-0.parquet", [
        row(qry=f"{I1}like this {n}", qry_image_path="images/COCO/a.png", neg_text=None,
            neg_image_path=None, pos_image_path="images/COCO/b.png") for n in range(4)])
    archive = tmp_path / "images_zip" / {"zip": "N.zip", "inner": "N.zip", "gz": "N.tar.gz",
                                         "tar": "N.tar"}[kind]
    archive.parent.mkdir()
    for name, color in (("a", "red"), ("b", "green")):
        (tmp_path / f"{name}.png").write_bytes(picture(color))
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive, "w") as zipped:
            for name in "ab":
                zipped.write(tmp_path / f"{name}.png", f"{top}COCO/{name}.png")
    else:
        with tarfile.open(archive, "w:gz" if kind == "gz" else "w") as tarred:
            for name in "ab":
                tarred.add(tmp_path / f"{name}.png", f"COCO/{name}.png")
    output = run(tmp_path, data.parent, archive.parent if kind == "gz" else archive)
    drawn = next(PairBatches(load_tasks(str(output), 0), moca.processor, 4, 64, 2, 0))
    packed = moca.processor.pack(drawn.records)
    assert len(packed.grids) == 8
    assert drawn.records[0].images[0].read_bytes() == picture("red")


def test_archives_stay_in_their_folder(tmp_path: Path, pictures: Path) -> None:
    """Names that lead out, and links, write nothing elsewhere; nor does an archive write into a
    folder of the user's that has the same name."""
    data = write(tmp_path / "d" / "NIGHTS" / "train.parquet", [row()]).parent
    for name in ("../../out.png", "COCO/../../../out.png", "/abs.png", "COCO/a.png"):
        with zipfile.ZipFile(tmp_path / "a.zip", "w") as zipped:
            zipped.writestr("COCO/a.png", picture())
            zipped.writestr(name, "bad")
        with pytest.raises(MocaError, match=r"a\.zip cannot be unpacked .*names"):
            run(tmp_path, data, tmp_path / "a.zip", output=str(tmp_path / "one"))
    assert not (tmp_path / "out.png").exists() and not Path("/abs.png").exists()

    with tarfile.open(tmp_path / "b.tar", "w") as tarred:
        link = tarfile.TarInfo("COCO")
        link.type, link.linkname = tarfile.SYMTYPE, str(pictures)
        tarred.addfile(link)
        entry = tarfile.TarInfo("COCO/new.png")
        entry.size = 3
        tarred.addfile(entry, io.BytesIO(b"bad"))
    with pytest.raises(MocaError, match=r"b\.tar cannot be unpacked"):
        run(tmp_path, data, tmp_path / "b.tar", output=str(tmp_path / "two"))
    with zipfile.ZipFile(tmp_path / "c.zip", "w") as zipped:
        zipped.writestr("COCO/a.png", "another")
    with pytest.raises(MocaError, match="COCO"):
        run(tmp_path, data, f"{tmp_path / 'c.zip'},{pictures}", output=str(tmp_path / "three"))
    assert (pictures / "COCO" / "a.png").read_bytes() == picture("red")
    assert not (pictures / "new.png").exists()
    for name in ("one", "two", "three"):
        assert not list(tmp_path.glob(f"{name}*")), "half a result"


@pytest.mark.parametrize("ending", [".ZIP", ".tar.bz2", ".txz"])
def test_archives_of_the_same_pictures(tmp_path: Path, ending: str) -> None:
    """A picture that two archives hold is there once; two pictures of one path are refused. What
    else archives hold is no data, whatever it is called."""
    data = write(tmp_path / "d" / "NIGHTS" / "train.parquet", [row()]).parent
    (tmp_path / "z").mkdir()

    def pack(name: str, content: bytes) -> None:
        archive = tmp_path / "z" / (name + ending)
        if ending == ".ZIP":
            with zipfile.ZipFile(archive, "w") as zipped:
                zipped.writestr("COCO/a.png", content)
                zipped.writestr("COCO/list.jsonl", "no data")
            return
        with tarfile.open(archive, f"w:{'bz2' if 'bz2' in ending else 'xz'}") as tarred:
            for inner, held in (("COCO/a.png", content), ("COCO/list.jsonl", b"no data")):
                entry = tarfile.TarInfo(inner)
                entry.size = len(held)
                tarred.addfile(entry, io.BytesIO(held))

    pack("a", picture())
    pack("b", picture())
    output = run(tmp_path, data, tmp_path / "z")
    (pair,) = load_tasks(str(output), 0)["NIGHTS"]
    assert pair.positive.images[0].read_bytes() == picture()
    pack("b", picture("blue"))
    with pytest.raises(MocaError, match=r"b\..* cannot be unpacked .*another COCO/a.png"):
        run(tmp_path, data, tmp_path / "z", output=str(tmp_path / "two"))
    assert not list(tmp_path.glob("two*"))


def test_folders_that_hold_all(tmp_path: Path, pictures: Path) -> None:
    """Images may lie among the published data, and the output among either; the same pairs are
    read once."""
    root = pictures.parent
    data = write(root / "NIGHTS" / "train.parquet", [row()]).parent
    write(pictures / "NIGHTS" / "train.parquet", [row()])
    output = run(tmp_path, data, root, output=str(pictures / "out"))
    assert len(load_tasks(str(output), 0)["NIGHTS"]) == 1
    (root / "link").mkdir()
    (root / "link" / "again.parquet").symlink_to(data / "train.parquet")
    output = run(tmp_path, f"{data},{root / 'link'}", pictures, output=str(root / "one"))
    assert len(load_tasks(str(output), 0)["NIGHTS"]) == 1
    output = run(tmp_path, data / "train.parquet", pictures, output=str(root / "file"))
    assert len(load_tasks(str(output), 0)["NIGHTS"]) == 1


def test_broken_archives(tmp_path: Path) -> None:
    """One line that names the file."""
    data = write(tmp_path / "d" / "NIGHTS" / "train.parquet", [row()]).parent
    for number, name in enumerate(("a.zip", "a.tar.gz", "a.tar")):
        (tmp_path / name).write_bytes(b"no archive")
        with pytest.raises(MocaError, match=name):
            run(tmp_path, data, tmp_path / name, output=str(tmp_path / str(number)))


def test_three_copies_of_the_same_pairs(tmp_path: Path, pictures: Path,
                                        capsys: pytest.CaptureFixture) -> None:
    """Of MMEB-train's files one kind is taken, all its parts, and the others are named."""
    folder = tmp_path / "MMEB-train" / "CIRR"
    for name in ("train-00000-of-00001", "original-00000-of-00002", "original-00001-of-00002",
                 "diverse_instruction-00000-of-00001"):
        rows = [{key: value for key, value in row(qry=f"{name}\n").items() if "neg" not in key}]
        write(folder / f"{name}.parquet", rows)
    output = run(tmp_path, tmp_path / "MMEB-train", pictures)
    assert [line["query"]["text"][:14] for line in lines(output / "CIRR.jsonl")] == [
        "original-00000", "original-00001"]
    said = capsys.readouterr().out
    assert "train-00000-of-00001.parquet is left out" in said and "diverse_instruction" in said


@pytest.mark.filterwarnings("ignore:invalid escape")
def test_a_list_is_parsed_and_never_run(tmp_path: Path, pictures: Path,
                                        capsys: pytest.CaptureFixture) -> None:
    """What is no list of texts is refused with file and row, or skipped and counted."""
    proof = tmp_path / "proof"
    hostile = [f"[open({str(proof)!r}, 'w')]", f"[__import__('os').system('touch {proof}')]",
               "[1, 2]", "['a' for a in 'b']", "[" * 500 + "]" * 500, 
               "['a', ['b']]", "[unclosed, ]",
               "['a', 'b", '["a', "['a'", "[b'a']", "[('a',)]", "[{'a': 'b'}]", '["a", null]',
               "[...]", "[*'ab']", "[" + "1+" * 10**5 + "1]", "[" * 10**5 + "]" * 10**5,
               "['" + "a" * 2**20 + "']", "[-" + "-" * 10000 + "1]", "['\0']"]
    for text in hostile:
        with pytest.raises(MocaError, match="row 7"):
            read_list(text, "row 7")
    for text, parsed in (("['a\\d', \"it's\"]", ["a\\d", "it's"]), ("[]", []), (None, []),
                         ("[a] or b", ["[a] or b"]), (["x"], ["x"])):
        assert read_list(text, "") == parsed
    data = write(tmp_path / "d" / "WebQA" / "train.parquet", [
        row(), row(neg_text=hostile[0]), row(qry=" \n"), row(pos_image_path="images/COCO/none.png"),
        row(pos_image_path="../COCO/a.png"), row(pos_text=I1 + I1), row(),
        row(pos_image_path="images/" + "a" * 400), row(pos_image_path="\x1b[2J\nWebQA: 9 pairs")])
    with pytest.raises(MocaError, match=r"train\.parquet row 2: its negatives"):
        run(tmp_path, data.parent, pictures)
    assert not (tmp_path / "pairs").exists(), "half a result"
    output = run(tmp_path, data.parent, pictures, on_error="skip")
    assert len(lines(output / "WebQA.jsonl")) == 2 and not proof.exists()
    said = capsys.readouterr().out
    assert "WebQA: 2 pairs of kind image-text, 7 rows skipped" in said
    assert len(said.splitlines()) == 8 and said.count("skipped: ") == 7
    assert "images/COCO/none.png is missing" in said


def test_kinds_are_not_guessed(tmp_path: Path, pictures: Path) -> None:
    """A subset that no table names needs one, and a table may say otherwise."""
    data = tmp_path / "d"
    write(data / "mine" / "train.parquet", [row()])
    write(data / "NIGHTS" / "train.parquet", [row()])
    with pytest.raises(MocaError, match="--kinds.* mine"):
        run(tmp_path, data, pictures)
    table = tmp_path / "kinds.json"
    table.write_text('{"mine": "text-only", "NIGHTS": "images"}')
    with pytest.raises(MocaError, match="--kinds.* NIGHTS"):
        run(tmp_path, data, pictures, kinds=str(table))
    for content in ("", "[]", "{"):
        table.write_text(content)
        with pytest.raises(MocaError, match=r"kinds\.json cannot be read .*--kinds"):
            run(tmp_path, data, pictures, kinds=str(table))
    table.write_text('{"mine": "text-only"}')
    output = run(tmp_path, data, pictures, kinds=str(table))
    assert lines(output / "mine.jsonl")[0]["kind"] == "text-only"


def test_nothing_is_replaced(tmp_path: Path, pictures: Path) -> None:
    """An output that exists, no data, a column too few, two subsets of one name: one line."""
    data = write(tmp_path / "d" / "NIGHTS" / "train.parquet", [row()]).parent
    (tmp_path / "pairs").mkdir()
    (tmp_path / "pairs" / "mine").write_text("mine")
    with pytest.raises(MocaError, match="pairs exists"):
        run(tmp_path, data, pictures)
    assert (tmp_path / "pairs" / "mine").read_text() == "mine"
    for bad, words in (("", "--data"), (pictures, "no parquet"), (tmp_path / "absent", "absent")):
        with pytest.raises(MocaError, match=words):
            run(tmp_path, bad, output=str(tmp_path / "other"))
    write(tmp_path / "e" / "NIGHTS" / "train.parquet", [{"query": "a"}])
    with pytest.raises(MocaError, match="lacks a column"):
        run(tmp_path, tmp_path / "e", output=str(tmp_path / "other"))
    write(tmp_path / "f" / "NIGHTS" / "train.parquet", [row()]).write_bytes(b"PAR1 no more")
    with pytest.raises(MocaError, match=r"train\.parquet cannot be read"):
        run(tmp_path, tmp_path / "f", output=str(tmp_path / "other"))
    for images in ("", ",", tmp_path / "absent", f"{pictures},{pictures}"):
        with pytest.raises(MocaError):
            run(tmp_path, tmp_path / "d", images, output=str(tmp_path / "other"))
    assert not list(tmp_path.glob("other*"))
    with pytest.raises(MocaError, match="another folder"):
        run(tmp_path, f"{tmp_path / 'd'},{tmp_path / 'e'}", output=str(tmp_path / "other"))
    assert os.listdir(tmp_path / "d") == ["NIGHTS"] and not (tmp_path / "other").exists()
