"""Changes of a written checkpoint's index, as other versions and careful hands leave it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from compress_tools.output.run_record import RECORD_KEY, TEXTS_KEY
from compress_tools.source.reader import INDEX_NAME


def edit_index(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the index, but not what it says of itself."""
    index = json.loads((folder / INDEX_NAME).read_text())
    change(index)
    (folder / INDEX_NAME).write_text(json.dumps(index))


def forget_digests(folder: Path) -> Path:
    """Leave an index as versions wrote it that kept no digests of texts: changes of them are told by what they say."""
    edit_index(folder, lambda index: index[RECORD_KEY].pop(TEXTS_KEY))
    return folder
