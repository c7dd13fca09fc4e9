"""Pages made from the code at build time: one a registered mechanism with its picture, and the list of papers."""

import inspect
import tempfile
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

import gridattn.layers as layers
from gridattn.catalog import PAPERS
from gridattn.lab.pictures import save_pattern


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the generated pages and pictures to the site."""
    pictures = Path(tempfile.mkdtemp())
    for name in layers.list_attentions():
        save_pattern(name, pictures / f"{name}.png")
        picture = (pictures / f"{name}.png").read_bytes()
        files.append(File.generated(config, f"mechanisms/img/{name}.png", content=picture))
        files.append(File.generated(config, f"mechanisms/{name}.md", content=mechanism_page(name)))
    files.append(File.generated(config, "mechanisms/index.md", content=mechanism_index()))
    files.append(File.generated(config, "papers.md", content=papers_page()))
    return files


def mechanism_page(name: str) -> str:
    info = layers.attention_info(name)
    defaults = inspect.signature(info.layer.__init__).parameters
    options = "\n".join(f"| `{option}` | `{defaults[option].default!r}` |" for option in info.options)
    return f"""# {name}

{info.summary}. {f"Source: {info.source}." if info.source else ""}

![Where one query looks]({f"img/{name}.png"}){{ width=420 }}

What the marked query reaches in a layer with random weights: {
        "the mechanism's own weights, averaged over heads and inputs"
        if info.exact_map
        else "the gradient of its output, since the mechanism has no attention weights"
    }.

| grid axes | causal | cost grows linearly | smallest grid |
|---|---|---|---|
| {", ".join(map(str, info.ranks))} | {"yes" if info.causal else "no"} | {"yes" if info.linear_cost else "no"} | {
        info.min_size
    } |

| option | default |
|---|---|
{options}

```python
from gridattn import create_attention
layer = create_attention("{name}", dim=64, num_heads=4, grid={(14,) * (2 if 2 in info.ranks else info.ranks[0])})
```

::: {info.layer.__module__}.{info.layer.__name__}
"""


def mechanism_index() -> str:
    rows = "\n".join(
        f"| [{name}]({name}.md) | {info.summary} | {info.source} | {', '.join(map(str, info.ranks))} |"
        for name in layers.list_attentions()
        for info in [layers.attention_info(name)]
    )
    return f"# Mechanisms\n\n| name | what it does | source | grid axes |\n|---|---|---|---|\n{rows}\n"


def papers_page() -> str:
    rows = "\n".join(
        f"| {paper.title} | {paper.year} | {paper.arxiv or ''} | {paper.status} | {', '.join(paper.available)} |"
        for paper in PAPERS
    )
    head = "| paper | year | arXiv | status | what is here |\n|---|---|---|---|---|\n"
    return f"# Papers\n\nThe status is computed from what the library registers.\n\n{head}{rows}\n"
