"""``armt eval``: how well a model remembers, answers and predicts."""

from __future__ import annotations

import typer

from armt.cli import eval_babilong, eval_plot, eval_retrieval, perplexity

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Measures a model: what it remembers, answers and predicts.\n\n"
    "Example:\n\n\b\n  armt eval babilong demo --lengths 1k,4k,16k",
)
app.command("retrieval", short_help="Pairs of key and value: which value had this key?")(
    eval_retrieval.retrieval
)
app.command("babilong", short_help="Facts hidden in books: questions about them.")(
    eval_babilong.babilong
)
app.command("perplexity", short_help="How well every token of a text is predicted.")(
    perplexity.perplexity
)
app.command("plot", short_help="Draws the results of several runs together.")(eval_plot.plot)
