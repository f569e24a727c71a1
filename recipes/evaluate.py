"""Score a model on rows with known answers: base and tuned side by side, on one loaded model.

lmtune evaluate runs/support heldout.jsonl --metric f1 --by topic
"""

from typing import Annotated

import typer

from lmtune.data.checking import check_data
from lmtune.data.columns import columns_of
from lmtune.errors import ConfigError
from lmtune.evaluation import options
from lmtune.io.console import progress, warn
from lmtune.run import run
from lmtune.runs.columns import columns_for, run_of


def main(
    target: Annotated[str, typer.Argument(metavar="RUN_OR_MODEL", help=options.TARGET)],
    data: options.Data = None,
    metric: options.Metrics = None,
    by: options.By = None,
    exact_match_rows: options.AnswerRows = 200,
    max_new_tokens: options.NewTokens = 128,
    max_length: options.MaxLength = 2048,
    judge: options.JudgeAddress = None,
    judge_model: options.JudgeModel = None,
    judge_reference: options.JudgeReference = False,
    drift: options.Drift = False,
    drift_prompts: options.DriftPrompts = None,
    lm_eval: options.LmEval = None,
    output: options.Output = None,
    shown: options.Shown = 3,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document: base, tuned, intervals, rows, …")] = False,
    confusion: options.Confusion = None,
    columns: options.ColumnNames = None,
    vote: Annotated[bool, typer.Option("--vote", help="Of an ensemble: count votes, not the mean.")] = False,
    base: options.Base = None,
) -> None:
    """Loss, accuracies and metrics of generated answers with 95 % intervals; of classes F1 and confusion.

    A tuned model stands beside its base, and the rows that got worse come first. With a run, rows that it was trained
    on are counted and warned about.

    Example: lmtune evaluate runs/support heldout.jsonl --metric f1 --by topic
    """
    from lmtune.evaluation import judging, showing
    from lmtune.evaluation.answer_files import is_answer_file
    from lmtune.evaluation.answer_metrics import answer_metrics
    from lmtune.evaluation.slices import require_field

    metrics, named = answer_metrics(metric, ("f1", "chrf")), columns_of(columns or [])
    if is_answer_file(target):
        if data:
            raise ConfigError(f"{target} holds answers and the rows that they are of; leave {data[0]} out")
        if judge is not None:
            raise ConfigError(f"--judge: {target} holds answers of one model; `lmtune compare` lets it judge two files")
        showing.evaluate_file(target, metrics, by, output, as_json, named)
        return
    drift = drift or drift_prompts is not None
    if not (data or drift or lm_eval):
        raise ConfigError("DATA: missing; give files or folders of rows with known answers, or --drift")
    paths = tuple(str(path) for path in data or ())
    known = columns_for(run_of(target), paths, named) if paths else None
    if paths:
        check_data(paths, columns=known)
        require_field(by, paths)
    elif judge is not None:
        raise ConfigError("--judge: compares answers to rows; give files or folders of rows as DATA")
    asked = judging.open_judge(judge, judge_model, [target], exact_match_rows)
    with progress("loading PyTorch and the libraries"):
        from lmtune.evaluation.evaluate import evaluate_loaded
        from lmtune.evaluation.further import print_further, score_further
        from lmtune.inference.load import load_for_inference

    loaded = load_for_inference(target, base=base, method="vote" if vote else None)
    further = score_further(loaded, drift, drift_prompts, lm_eval)  # first: a model of which there is none is told soon
    tree: showing.Tree = {**further.as_dict()}
    rows: judging.Rows = ()
    name = beside = ""
    if paths:
        found = evaluate_loaded(loaded, paths, exact_match_rows, max_new_tokens, max_length, known, metrics, by)
        if found.trained_rows:
            warn(f"{found.trained_rows} of {found.tuned.rows} rows were trained on; their scores say nothing of others")
        tree = {**showing.evaluation_tree(found, metrics), **tree}
        showing.write_rows(output, tree["rows"])
        compared = None if found.comparison is None or judge_reference else found.comparison
        rows, beside = (found.rows, "the reference") if compared is None else (compared.rows, "the base")
        name = target if found.base is None else "tuned"
        if not as_json:
            showing.print_evaluation(found, metrics, shown, by)
    if not as_json:
        print_further(further, shown)
    judging.judge_scored(asked, rows, tree, output, (name, beside), as_json)
    showing.draw_confusion(confusion, tree.get("classes"))


if __name__ == "__main__":
    run(main)
