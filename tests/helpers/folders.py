"""What commands leave in a folder."""

import json

# Entries of a record that differ from run to run.
_OF_A_RUN = {"seconds", "environment", "batches_drawn_before", "parts_finished_before"}


def contents(folder):
    """Return the bytes of every file below a folder by its path there."""
    return {
        file.relative_to(folder).as_posix(): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file()
    }


def record_of(file):
    """Return the entries of a record that are those of any run, in any folder."""
    record = json.loads(file.read_text(encoding="utf-8"))
    return {
        name: value
        for name, value in record.items()
        if name not in _OF_A_RUN and value != str(file.parent)
    }


def assert_same(found, wanted):
    """Raise unless two folders hold the same folders and files, of the same bytes or records."""
    paths = [{path.relative_to(root) for path in root.rglob("*")} for root in (found, wanted)]
    assert paths[0] == paths[1]
    one, other = contents(found), contents(wanted)
    for name in (name for name in one if one[name] != other[name]):
        assert name.endswith(".json"), name
        assert record_of(found / name) == record_of(wanted / name)


def assert_whole(folder):
    """Raise unless every file of JSON, tensors or pixels below a folder can be read to its end."""
    from PIL import Image
    from safetensors.torch import load_file

    for file in folder.rglob("*"):
        if any(map(_is_unfinished, file.relative_to(folder).parts)):
            continue
        if file.suffix == ".json":
            json.loads(file.read_text(encoding="utf-8"))
        elif file.suffix == ".safetensors":
            load_file(file)
        elif file.suffix == ".png":
            with Image.open(file) as picture:
                picture.load()


def left_beside(folder):
    """Return the files and folders that were being written when a process was killed."""
    return [path for path in folder.rglob("*") if _is_unfinished(path.name)]


def _is_unfinished(name):
    """Whether it lies beside the file or the folder that it was to become."""
    return name.startswith(".partial-") or name == "training-state.partial"
