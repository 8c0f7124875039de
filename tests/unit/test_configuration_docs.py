"""docs/configuration.md says what the code says."""

import importlib.util
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_page_is_what_the_code_describes() -> None:
    spec = importlib.util.spec_from_file_location("writer", ROOT / "tools" / "write_configuration_docs.py")
    assert spec is not None
    assert spec.loader is not None
    writer = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(writer)
    written = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert written == writer.text(), "run: python tools/write_configuration_docs.py"
