"""Lay the site out like the repository, so that a link between two files is the same on a forge and on the site."""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

# Pages, and what they show or link to.
SHOWN = ("*.md", "docs/site.css", "docs/**/*.md", "examples/**/*.md", "examples/**/*.png", "benchmarks/results/**/*.*")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Return the theme's files and the repository's, in place of those of `docs_dir`."""
    root = Path(config.config_file_path).parent
    theme = [file for file in files if file.src_dir != config.docs_dir]
    shown = sorted({path.relative_to(root) for pattern in SHOWN for path in root.glob(pattern)})
    return Files(theme + [File(str(path), str(root), config.site_dir, config.use_directory_urls) for path in shown])
