//! Writes the families of the waiting of containers for their GPUs.

use super::catalogue::waits as families;
use super::encode::Page;
use super::exposition::Exposition;
use super::series_starts::{SeriesOwner, SeriesStarts};

/// One series for each container, however many GPUs it has.
pub fn containers(page: &Exposition, to: &mut Page, starts: &mut SeriesStarts) {
    let [waited, probed] = [&families::WAIT_SECONDS, &families::WAIT_PROBED_SECONDS].map(|family| to.family(family));
    let [pressure, stderr] = [&families::PRESSURE_RATIO, &families::PRESSURE_STDERR].map(|family| to.family(family));
    for pair in page.one_pair_of_each_container() {
        let Some(waits) = pair.waits else { continue };
        let (block, mut series) = (pair.container_block(), starts.of(SeriesOwner::Container(pair.key)));
        to.add_from_zero(waited, (&mut series, ""), &*block, waits.wait_seconds);
        to.add_from_zero(probed, (&mut series, ""), &*block, waits.probed_seconds);
        to.add_known(pressure, &*block, waits.pressure_ratio);
        to.add_known(stderr, &*block, waits.pressure_stderr);
    }
}

pub fn agent(probed_processes: usize, to: &mut Page) {
    to.add_one(&families::PROBED_PROCESSES, probed_processes as f64);
}
