"""The HTML report: what it holds, that it needs nothing else, and how a browser shows it."""

from __future__ import annotations

import dataclasses
import itertools
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bicompile
from bicompile import Certificate
from bicompile.report.drawing import Drawing, Spot, drawing_of
from bicompile.report.orders import orders_of, short_name
from bicompile.testing.declared import declared_order, declared_trees

# Debian's name for it; BICOMPILE_NEED_BROWSER=1 makes its absence a failure.
BROWSER = shutil.which("chromium")


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 200), nn.Linear(200, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


def hostile(x: Tensor) -> Tensor:
    inverse = torch.linalg.pinv(x)  # <img src=x onerror=alert(1)> & "more"
    return inverse - inverse.mean(0)


hostile.__qualname__ = "<script>document.title='run'</script>"


@pytest.fixture(scope="module")
def covered() -> Certificate:
    """Forward and backward: products, a norm, gradients of weights."""
    return bicompile.explain(Mlp(), torch.randn(4, 16, requires_grad=True))


@pytest.fixture(scope="module")
def refused() -> Certificate:
    """A refusal, a sum over the batch, a graph break, and text that must be escaped."""
    found = bicompile.explain(hostile, torch.randn(4, 7, 3))
    return dataclasses.replace(found, graph_breaks=("called <b>print</b>",), inputs=("args[0]: <i>x</i>",))


def count(page: str, pattern: str) -> int:
    return len(re.findall(pattern, page))


def additions(certificate: Certificate) -> int:
    orders, _ = orders_of(certificate)
    return sum(len(picture.drawing.additions) for order in orders for picture in order.pictures)


def test_the_page_names_every_node_its_line_and_its_order(covered: Certificate):
    page = covered.to_html()
    telling = [*covered.lowered, *covered.cross_batch]
    assert covered.proof[1:] in page and "Batch-invariant" in page
    assert count(page, '<li id="n') == len(telling)
    assert count(page, "#order-") == len(telling)
    assert "return x + self.down(F.gelu(self.up(self.norm(x))))" in page
    for node in covered.nodes:
        assert short_name(node.op) in page and node.shape in page and node.module in page
    assert "chain(0..191, [chain 192..199])" in page  # the products over 200
    assert {order.title for order in orders_of(covered)[0]} == {
        "Matrix product, float32, CPU",
        "Reduction over a row, float32, CPU",
    }


def test_the_page_says_what_is_missing_and_what_to_do(refused: Certificate):
    page = refused.to_html()
    assert "NOT proven" in page and "its order is not known" in page
    assert "&#34;allow&#34;: [&#34;aten.linalg_pinv&#34;]" in page.replace('"', "&#34;")
    assert "called &lt;b&gt;print&lt;/b&gt;" in page and "bicompile.eager()" in page
    assert "What combines rows of the batch" in page


def test_what_comes_from_the_user_is_escaped_and_nothing_is_loaded(refused: Certificate, covered: Certificate):
    page = refused.to_html()
    assert "&lt;img src=x onerror=alert(1)&gt; &amp; &#34;more&#34;" in page
    assert "&lt;script&gt;document.title" in page and "&lt;i&gt;x&lt;/i&gt;" in page
    for html in (page, covered.to_html()):
        assert not re.search(r"<script|<img|<link|<iframe|\son\w+=\"|url\(|@import|(src|href)=\"(?!#)", html)


def test_a_loss_without_scores_follows_the_orders_of_its_products_and_of_its_softmax():
    weight, target = torch.randn(300, 16, requires_grad=True), torch.arange(9)
    hidden = torch.randn(9, 16, requires_grad=True)

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return bicompile.linear_cross_entropy(hidden, weight, target, reduction="none")

    found = bicompile.explain(loss, hidden.bfloat16(), weight.bfloat16())
    orders, number = orders_of(found)
    followed = {short_name(node.op): {orders[i].title for i in which} for node, which in number.items()}
    product, softmax = "Matrix product, bfloat16, CPU", "Reduction over a row, bfloat16, CPU"
    assert followed["linear_log_probability"] == {product, softmax}
    assert followed["linear_log_probability_backward"] == {product}
    page = found.to_html()
    assert "its order 1</a>" in page and "its order 2</a>" in page
    (products,) = [order for order in orders if order.title == product]
    (sums,) = [order for order in orders if order.title == softmax]
    assert {16, 300} <= products.pictures[0].lengths.keys() and 300 in sums.pictures[0].lengths


def test_a_certificate_without_nodes_is_a_page_too():
    page = Certificate(graphs=()).to_html()
    assert "Batch-invariant" in page and "batch size is fixed" in page.lower()


ORDERS = [
    (op, dtype, device)
    for op in ("mm", "sum", "sdpa", "cumsum", "index_add")
    for dtype in (torch.float32, torch.bfloat16)
    for device in ("cpu", "cuda")
]


@pytest.mark.parametrize("n", [1, 2, 5, 19])
def test_drawings_show_every_summand_and_no_lines_cross(n: int):
    small = {"block": 4, "group": 4, "lanes": 4, "section": 8, "segment": 4, "splits": ((0, 16),)}
    for op, dtype, device in ORDERS:
        order = declared_order(op, 64, dtype, device)
        fields = {field.name for field in dataclasses.fields(order)}
        order = dataclasses.replace(order, **{name: value for name, value in small.items() if name in fields})
        for tree in declared_trees(order, n).values():
            drawing = drawing_of(tree)
            assert sorted(int(spot.text) for spot in drawing.summands) == list(range(n))
            assert len(drawing.lines) == n + len(drawing.additions)  # each has one line down
            assert all(
                0 < end.x < drawing.width and 0 < end.y < drawing.height for line in drawing.lines for end in line
            )
            assert not crossing(drawing), (op, device, str(tree))


def crossing(drawing: Drawing) -> list[tuple[tuple[Spot, Spot], tuple[Spot, Spot]]]:
    def side(a: Spot, b: Spot, c: Spot) -> float:
        return (b.x - a.x) * (c.y - a.y) - (b.y - a.y) * (c.x - a.x)

    return [
        (one, other)
        for one, other in itertools.combinations(drawing.lines, 2)
        if side(*one, other[0]) * side(*one, other[1]) < 0 and side(*other, one[0]) * side(*other, one[1]) < 0
    ]


@pytest.mark.skipif(
    BROWSER is None and os.environ.get("BICOMPILE_NEED_BROWSER") != "1",
    reason="no chromium here; BICOMPILE_NEED_BROWSER=1 would make this fail",
)
@pytest.mark.parametrize("name", ["covered", "refused"])
def test_a_browser_shows_verdict_nodes_and_trees(name: str, request: pytest.FixtureRequest, tmp_path: Path):
    certificate: Certificate = request.getfixturevalue(name)
    assert BROWSER is not None, "BICOMPILE_NEED_BROWSER=1, and no chromium; install it with: apt-get install chromium"
    (tmp_path / "report.html").write_text(certificate.to_html(), encoding="utf-8")
    quiet = "--disable-gpu --disable-background-networking --disable-component-update --no-first-run".split()
    command = [BROWSER, "--headless", "--no-sandbox", *quiet, f"--user-data-dir={tmp_path / 'profile'}"]
    shown = subprocess.run(
        [*command, "--enable-logging=stderr", "--dump-dom", (tmp_path / "report.html").as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    dom = shown.stdout
    assert shown.returncode == 0 and "CONSOLE" not in shown.stderr, shown.stderr
    assert f"<title>{'Mlp' if name == 'covered' else '&lt;script'}" in dom
    assert re.search(rf'id="verdict">.*{certificate.verdict[1:]}', dom, re.DOTALL)
    telling = [node for node in certificate.nodes if node.kind not in ("exact", "elementwise")]
    assert count(dom, '<li id="n') == len(telling) > 0
    orders, _ = orders_of(certificate)
    assert count(dom, '<svg class="tree"') == sum(len(order.pictures) for order in orders) > 0
    assert count(dom, '<(circle|rect) class="addition"') == additions(certificate) > 0
