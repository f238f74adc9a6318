//! Freezing experiments: who was frozen, and the effect on each GPU of the victim.

use super::super::layout::terminal_safe;
use super::super::model::{ExperimentReport, FreezeEffect};
use super::super::words;
use super::{PROBLEMS, TextPage};

impl TextPage<'_> {
    pub(super) fn experiments(&mut self) {
        let report = self.report;
        if report.experiments.is_empty() {
            return;
        }
        self.page.heading("Experiments");
        for experiment in report.experiments.iter().take(PROBLEMS) {
            self.experiment(experiment);
        }
        self.page.more(report.experiments.len(), PROBLEMS);
    }

    fn experiment(&mut self, experiment: &ExperimentReport) {
        let (victim, suspect) = (self.names.get(&experiment.victim), self.names.get(&experiment.suspect));
        let text = format!(
            "{suspect} was frozen in {} of {} bursts, {} each; victim {victim}, {}, seed {}",
            experiment.frozen_bursts,
            experiment.planned_bursts,
            words::seconds(experiment.freeze_seconds),
            words::consent(experiment.consent),
            experiment.seed
        );
        self.page.wrap("  ", &text);
        if experiment.gpus.is_empty() {
            self.page.wrap("    - ", "not confirmed: the victim has no sample on a GPU of the report");
        }
        for gpu in &experiment.gpus {
            let name = words::gpu_name(self.report, &gpu.uuid);
            gpu.effects.iter().for_each(|effect| self.effect(&format!("{name}, "), effect));
        }
        experiment.effects.iter().for_each(|effect| self.effect("", effect));
    }

    fn effect(&mut self, gpu: &str, effect: &FreezeEffect) {
        let means = words::freeze_means(effect, "the suspect").map(|means| format!(": {means}")).unwrap_or_default();
        let verdict = if effect.confirmed {
            "experiment-confirmed".to_owned()
        } else {
            format!("not confirmed ({})", terminal_safe(&effect.why_not))
        };
        self.page.wrap("    - ", &format!("{gpu}{}: {verdict}{means}", effect.outcome.name()));
    }
}
