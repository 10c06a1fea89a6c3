"""What a run of `train.language_model` says: its text, its results, its best epoch."""

from typing import Any

import numpy as np

from train.data import text
from train.evals import kneser_ney
from train.recipes import language_model as recipe
from train.run import log
from train.run.folder import Run
from train.run.report import changed_settings, machine, spread, summary
from train.run.trained_language_model import best_path

OVERFIT = 1.02  # times the best validation perplexity, at the end of training


def print_text(config: Any, corpus: text.Corpus) -> None:
    """How the text was split, what its size has chosen, and what is wrong with it."""
    if config.data_dir is None:
        return
    if corpus.note:
        print(corpus.note)
    other = {"small": "large", "large": "small"}[config.size]
    dropouts = ("words", "input", "hidden", "output", "weight")
    rates = [f"{getattr(config, f'{name}_dropout'):g} ({name})" for name in dropouts]
    print(
        f"{len(corpus.train):,} {text.unit_name(corpus.unit)} to train: {config.size} "
        f"settings (or --{other}), {config.layers} layers of {config.width} and "
        f"{config.embedding}, dropout {', '.join(rates)}, learning rate "
        f"{config.learning_rate:g}, {config.epochs} epochs."
    )
    for warning in text.warnings(corpus):
        print(f"Warning: {warning}")


def collect_results(
    config: Any, corpus: text.Corpus, run: Run, ignore: tuple[str, ...]
) -> dict[str, Any]:
    """The content of results.json, from the log.

    Args:
        config: of the run.
        corpus: its text.
        run: with its log.
        ignore: settings that are none of the recipe.
    """
    ends = [end for seed in run.seeds for end in run.lines("end", seed)]
    for end in ends:
        epochs = run.lines("epoch", end["seed"])
        end["train_seconds"] = sum(line["seconds"] for line in epochs)
        speeds = [line["tokens_per_second"] for line in epochs]
        end["tokens_per_second"] = float(np.mean(speeds))
    small, tokens = config.size == "small", len(corpus.train)
    default = recipe.defaults(config.model, config.recipe, small, tokens)
    results: dict[str, Any] = {
        "model": config.model,
        "recipe": config.recipe,
        "size": config.size,
        "changed": changed_settings(config, default, ignore),
        "tokens": [len(split) for split in corpus[:3]],
        "unit": corpus.unit,
        "words": len(corpus.vocabulary),
        "n": len(ends),
        "train_seconds": float(np.mean([end["train_seconds"] for end in ends])),
        **machine(run.lines("start")),
        "runs": ends,
    }
    end_of_line = corpus.vocabulary.index(text.EOS)
    for split in ("valid", "test"):
        tokens = getattr(corpus, split)
        ngrams = kneser_ney.perplexity(
            corpus.train, tokens, len(corpus.vocabulary), end_of_line
        )
        results[split] = {"n-gram": ngrams}
        results[split]["unknown"] = text.unknown_share(tokens, corpus.vocabulary)
        for key in ("perplexity", "with_cache"):
            results[split][key] = summary([end[split][key] for end in ends])
    if results["tokens"] == recipe.WIKITEXT2_TOKENS:
        results["article"] = recipe.PUBLISHED.get((config.model, config.recipe))
    return results


def report(
    config: Any, corpus: text.Corpus, run: Run, ignore: tuple[str, ...]
) -> dict[str, Any]:
    """Writes results.json and prints its main numbers; see `collect_results`."""
    results = collect_results(config, corpus, run, ignore)
    log.write_json(run.folder / "results.json", results)

    def both(key: str) -> str:
        return " / ".join(spread(results[split][key]) for split in ("valid", "test"))

    changed = "".join(f", {key} {value}" for key, value in results["changed"].items())
    ngrams = f"{results['valid']['n-gram']:.2f} / {results['test']['n-gram']:.2f}"
    unknown = " / ".join(f"{results[x]['unknown']:.1%}" for x in ("valid", "test"))
    print(
        f"{config.model}, {config.recipe}{changed}: perplexity (validation / test, "
        f"n = {results['n']}) {both('perplexity')}, with the neural cache "
        f"{both('with_cache')}.\nInterpolated Kneser-Ney 5-grams on the same text: "
        f"{ngrams}. Unknown {text.unit_name(corpus.unit)}, {text.UNKNOWN}: {unknown}.\n"
        f"{results['train_seconds']:.1f} s of training per run on "
        f"{results['devices']}, after {results['compile_seconds'][-1]:.1f} s of "
        "compilation."
    )
    if results.get("article"):
        numbers = [f"{x[0]} / {x[1]}" for x in results["article"] if x]
        print(f"Published, without and with the cache: {', '.join(numbers)}.")
    for end in results["runs"]:
        if sentence := describe_best(end, run):
            print(sentence)
    print(f"Wrote {run.folder}.", flush=True)
    return results


def describe_best(end: dict[str, Any], run: Run) -> str:
    """Where a seed was best, if that was not at its end; empty otherwise."""
    best = end.get("best", {})  # runs of earlier versions have none
    last = len(run.lines("epoch", end["seed"]))
    if not best or best["epoch"] == last:
        return ""
    at_best, at_end = np.exp(best["valid_loss"]), end["valid"]["perplexity"]
    sentence = f"Seed {end['seed']}: best at epoch {best['epoch']} of {last}"
    if at_end > OVERFIT * at_best:
        sentence += ", then it overfits"
    sentence += f" (validation perplexity {at_best:.2f}, {at_end:.2f} at the end)."
    if "test" in best:
        path = best_path(run.folder, end["seed"])
        sentence += (
            f" The best network is in {path.name}: test perplexity "
            f"{best['test']['perplexity']:.2f}, with the cache "
            f"{best['test']['with_cache']:.2f}."
        )
    return sentence
