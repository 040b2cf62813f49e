"""The Tune tab: a fidelity budget in, every configuration as it is measured, and the profile of the fastest inside."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from imagegen.comparison import Trial
from imagegen.receipt import slug
from imagegen.report import in_words
from imagegen.request import RequestError
from imagegen.studio.draw import figures_html, pareto_svg, progress_html, table_html
from imagegen.studio.parts import PRIVATE, PROFILES, Stopped, Studio, Tell, connect_run, errors_shown, follow_work, narrate
from imagegen.tuner import TunedProfile, make_budget, tune

PSNR, SSIM, FLIP = "PSNR, at least (dB)", "SSIM, at least", "FLIP, at most"
BUDGETS = {PSNR: ("min_psnr_db", 30.0), SSIM: ("min_ssim", 0.95), FLIP: ("max_flip", 0.05)}
HEAD = ("configuration", "a picture", "worst PSNR", "worst SSIM", "worst FLIP", "budget")
MAX_MINUTES = 120
EMPTY = {
    "A picture": ("–", "stock diffusers in turn"),
    "Faster by": ("–", "than stock diffusers"),
    "Worst": ("–", "of the unseen pictures"),
}


def lay_out_tune(studio: Studio) -> SimpleNamespace:
    """Put the budget beside what is measured; return the parts by name."""
    import gradio as gr

    tab, family = SimpleNamespace(), studio.model.family
    with gr.Row(equal_height=False):
        with gr.Column(scale=4):
            tab.metric = gr.Radio(list(BUDGETS), value=PSNR, label="How near to stock diffusers every picture must be")
            tab.bound = gr.Number(BUDGETS[PSNR][1], label="Bound")
            with gr.Row():
                tab.steps = gr.Slider(1, 100, family.num_steps, step=1, label="Steps")
                tab.guidance = gr.Slider(1, 20, family.guidance, step=0.1, label="Guidance")
            tab.any_steps = gr.Checkbox(False, label="Fewer steps are allowed")
            tab.minutes = gr.Slider(0.5, MAX_MINUTES, 8, step=0.5, label="Minutes at most")
            tab.name = gr.Textbox(label="Name of the profile", placeholder="fast enough", max_lines=1)
            with gr.Row():
                tab.run = gr.Button("Tune", variant="primary", scale=3)
                tab.stop = gr.Button("Stop", interactive=False, scale=1, min_width=80)
            tab.progress = gr.HTML(progress_html("Nothing measured yet", 0))
            gr.HTML("<p class='hint'>What was measured is kept: after a stop, the same settings go on from there.</p>")
        with gr.Column(scale=6):
            tab.figures = gr.HTML(figures_html(EMPTY, "The profile is used in Generate and Compare, or with imagegen --plan."))
            tab.profile = gr.DownloadButton("Download the profile", size="sm", interactive=False)
            tab.chart = gr.HTML("<div class='chart blank'>The chart of time against fidelity grows here.</div>")
            tab.rows = gr.HTML(table_html(HEAD, [], "Configurations, in the order of their measuring"))
    return tab


def rows_html(trials: Sequence[Trial], bound: Any) -> str:
    """Return the table of trials, the last one first."""
    rows = []
    for trial in reversed(trials):
        worst = {name: trial.worst(name) for name in ("psnr_db", "ssim", "flip")}
        ssim, flip = (f"{worst[name]:.4f}" if worst[name] == worst[name] else "–" for name in ("ssim", "flip"))
        kept = "inside" if bound.keeps(trial.worst(bound.metric)) else "outside"
        rows.append((trial.plan, f"{trial.median_s:.3f} s", in_words(worst["psnr_db"]), ssim, flip, kept))
    return table_html(HEAD, rows, f"{len(trials)} configurations measured, the last one first")


def profile_html(profile: TunedProfile) -> str:
    """Return what a profile gives, and how sure that is."""
    speed, evidence, metric = profile.speed, profile.evidence, profile.budget["metric"]
    worst = in_words(evidence["worst"]) if metric == "psnr_db" else f"{evidence['worst']:.4f}"
    figures = {
        "A picture": (f"{speed['median_s']:.3f} s", f"stock diffusers in turn {speed['stock_median_s']:.3f} s"),
        "Faster by": (f"{speed['ratio']:.2f} ×", "than stock diffusers"),
        "Worst": (worst, f"budget {profile.budget['bound']:g}, {evidence['n']} unseen pictures"),
    }
    rate = f"{evidence['failure_rate_below']:.0%}"
    plan = " + ".join(profile.plan) or "exact"
    return figures_html(figures, f"{plan}. Fewer than {rate} of pictures leave the budget (95 % confidence).")


def run_tune(studio: Studio, folder: Path, settings: dict[str, Any], name: str, trials: list[Trial], tell: Tell) -> TunedProfile:
    """Search, and save the profile in the visitor's folder; trials are added to the list as they are measured."""
    tell("waiting for the model", 0, 1)
    with studio.engine.alone() as model:
        profile = tune(model, progress=tell, watch=trials.append, **settings)
    profile.save(folder / PROFILES / f"{slug(name or 'tuned')}.json")
    return profile


def connect_tune(studio: Studio, tab: SimpleNamespace) -> None:
    """Make the tab work."""
    import gradio as gr

    def run(
        metric: str,
        bound: float,
        num_steps: int,
        guidance: float,
        any_steps: bool,
        minutes: float,
        name: str,
        request: gr.Request,
    ) -> Iterator[dict[Any, Any]]:
        stop, folder = studio.stop_of(request), studio.folder(request)
        with errors_shown():
            if metric not in BUDGETS:
                raise RequestError(f"there is no measure {metric!r}: choose one of {', '.join(BUDGETS)}")
            if not isinstance(minutes, (int, float)) or not 0 < minutes <= MAX_MINUTES:
                raise RequestError(f"give from 0.5 to {MAX_MINUTES} minutes, got {minutes!r}")
            given: dict[str, Any] = {BUDGETS[metric][0]: bound}
            nothing = dict.fromkeys(("min_psnr_db", "min_ssim", "max_flip", "max_memory_gib"))
            budget = make_budget(**(nothing | given))
            settings = given | {"num_steps": int(num_steps), "guidance": guidance, "any_steps": any_steps, "minutes": minutes}
            trials: list[Trial] = []
            budget_db = budget.bound if budget.metric == "psnr_db" else None
            shown = 0

            def measured() -> dict[Any, Any]:
                nonlocal shown
                if len(trials) == shown:
                    return {}
                shown = len(trials)
                chart = pareto_svg([trial.summary() for trial in trials], budget_db)
                return {tab.rows: rows_html(trials, budget), tab.chart: chart}

            try:
                work = follow_work(lambda tell: run_tune(studio, folder, settings, name, trials, tell), stop)
                profile = yield from narrate(work, tab.progress, measured)
            except Stopped:
                yield {tab.progress: progress_html("Stopped; the same settings go on from here", 0)}
                return
            shown = 0
            path = folder / PROFILES / f"{slug(name or 'tuned')}.json"
            yield {
                tab.progress: progress_html("Done", 1),
                tab.figures: profile_html(profile),
                tab.profile: gr.update(value=str(path), interactive=True),
            } | measured()

    tab.metric.change(lambda metric: BUDGETS.get(metric, ("", 30.0))[1], tab.metric, tab.bound, **PRIVATE)
    connect_run(
        studio, tab, [tab.run.click], run, api_name="tune", show_progress="hidden",
        inputs=[tab.metric, tab.bound, tab.steps, tab.guidance, tab.any_steps, tab.minutes, tab.name],
        outputs=[tab.progress, tab.figures, tab.profile, tab.chart, tab.rows],
    )  # fmt: skip
