//! What a run prints: a line for each fault, and the table at its end.

use std::collections::BTreeMap;
use std::fmt;

use super::SoakVerdict;
use super::board::{BoardState, Scrape, lock};
use super::faults::{INJECTED, NEVER_INJECTED};
use super::resources::{ANONYMOUS_BYTES, DESCRIPTORS, LOG_LINES, ResourceUse, THREADS, growth, lines_a_minute};
use super::run::{FaultRecord, SoakRun};
use super::scrapers::LATENCY_SECONDS;

const LINE_MOST: usize = 110;

impl fmt::Display for FaultRecord {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { plan, begun, ended, .. } = self;
        write!(f, "{begun:7.1} s  {:<16}", plan.kind.name())?;
        if let Some(reason) = &self.refused {
            return write!(f, "not injected: {reason}");
        }
        write!(f, "{:4.1} s  {:?}  ", ended - begun, plan.reach)?;
        match self.converged {
            Some(after) => write!(f, "converged after {after:.1} s")?,
            None => write!(f, "NOT CONVERGED")?,
        }
        if !self.conditions.is_empty() {
            write!(f, "; degraded: {}", self.conditions.iter().cloned().collect::<Vec<_>>().join(" "))?;
        }
        if !self.note.is_empty() {
            write!(f, "; {}", self.note)?;
        }
        write!(f, "; {} log lines", self.log_lines)?;
        if !self.first_line.is_empty() {
            write!(f, "\n             {}", shortened(&self.first_line))?;
        }
        Ok(())
    }
}

fn shortened(line: &str) -> String {
    let line: String = line.chars().filter(|c| !c.is_control()).collect();
    match line.char_indices().nth(LINE_MOST) {
        Some((at, _)) => format!("{}..", &line[..at]),
        None => line,
    }
}

/// The value below which this share of the sorted values lies.
fn quantile(sorted: &[f64], share: f64) -> f64 {
    let last = sorted.len().saturating_sub(1);
    sorted.get((last as f64 * share).round() as usize).copied().unwrap_or(f64::NAN)
}

fn scrapes(name: &str, scrapes: &[Scrape]) -> String {
    let mut took: Vec<f64> = scrapes.iter().filter(|scrape| !scrape.excused).map(|scrape| scrape.took * 1000.0).collect();
    took.sort_by(f64::total_cmp);
    format!(
        "scrapes of {name}: {}, of which {} while the agent could not run; p50 {:.0} ms, p99 {:.0} ms, max {:.0} ms (bound {:.0} ms)",
        scrapes.len(),
        scrapes.len() - took.len(),
        quantile(&took, 0.5),
        quantile(&took, 0.99),
        quantile(&took, 1.0),
        LATENCY_SECONDS * 1000.0
    )
}

/// The table at the end. Returns whether there is no violation.
pub fn print(run: &SoakRun<'_>, verdict: &SoakVerdict) -> bool {
    let SoakVerdict { steady, owners, sessions } = verdict;
    let state = lock(&run.board.state);
    println!("\nfigures of {:.0} s, seed {}", run.board.now(), run.options.seed);
    for (name, of_scraper) in &state.scrapes {
        println!("  {}", scrapes(name, of_scraper));
    }
    resources(run);
    let worst = |of: fn(&super::accounts::LifeAccount) -> f64| state.accounts.iter().map(of).fold(0.0, f64::max);
    println!("  busy time minus its users and reasons: at most {:.1e} s", worst(|account| account.worst_books));
    println!("  credited time that no series of a user has yet: at most {:.2} s", worst(|account| account.worst_behind));
    println!("  wall time in no state, outside of faults: at most {:.2} s", worst(|account| account.worst_lag));
    println!(
        "  samples of containers and units: {} recorded, {} while an agent ran, {} credited; {} of host processes",
        owners.recorded, owners.in_lives, owners.credited, owners.host
    );
    println!(
        "  samples in sessions: {} compared one by one, of which {} have a reason instead of a user",
        sessions.compared, sessions.unattributed
    );
    println!("  sessions: {} checked, {} interrupted by the end of the agent", run.sessions.finished, run.sessions.interrupted);
    let sum = |of: fn(&super::accounts::LifeAccount) -> usize| state.accounts.iter().map(of).sum::<usize>();
    println!(
        "  pairs of a user and a GPU that were credited: {}; containers exposed before their labels were read: {}",
        sum(|account| account.credits.len()),
        sum(|account| account.blank.len())
    );
    faults(run);
    unknown_time(run, &state);
    println!(
        "  {:<14} GPU  credited      used     error    stated   unknown | quiet: credited, used, stated | samples: credited, recorded",
        "steady user"
    );
    for user in steady {
        let of_user = run.world.steady.iter().find(|known| known.name == user.name);
        let pair = of_user.map(|known| (known.id.clone(), run.world.uuids[user.gpu].clone()));
        let (recorded, credited) = pair.and_then(|pair| owners.pairs.get(&pair).copied()).unwrap_or_default();
        println!(
            "  {:<14} {:>3} {:>9.2} {:>9.2} {:>9.2} {:>9.2} {:>9.2} | {:.2} {:.2} {:.2} | {credited} {recorded}",
            user.name,
            user.gpu,
            user.credited,
            user.real,
            user.credited - user.real,
            user.stated,
            user.unknown,
            user.quiet_credited,
            user.quiet_real,
            user.quiet_stated
        );
    }
    println!("  all others: {} samples credited of {} recorded while an agent ran", owners.short.1, owners.short.0);
    violations(&state, run)
}

/// Time of the GPUs that is unobserved or has a reason instead of a user, over all lives.
fn unknown_time(run: &SoakRun<'_>, state: &BoardState) {
    for (n, uuid) in run.world.uuids.iter().enumerate() {
        let mut seconds: BTreeMap<String, f64> = BTreeMap::new();
        for sample in state.accounts.iter().filter_map(|account| account.last.as_ref()).flat_map(|page| &page.samples) {
            let label = match &*sample.name {
                "gpu_time_seconds_total" => "state",
                "gpu_unattributed_seconds_total" => "reason",
                _ => continue,
            };
            if sample.labels.get("uuid") == Some(uuid) {
                *seconds.entry(sample.labels.get(label).cloned().unwrap_or_default()).or_default() += sample.value;
            }
        }
        let shown: Vec<String> = seconds.iter().filter(|(_, s)| **s > 0.0).map(|(name, s)| format!("{name} {s:.2}")).collect();
        println!("  GPU {n}, seconds: {}", shown.join(", "));
    }
}

fn resources(run: &SoakRun<'_>) {
    let all = || run.subject.lives.iter().flat_map(|life| &life.used).copied();
    let most = all().fold(ResourceUse::default(), ResourceUse::max);
    println!(
        "  largest of {} lives: {} bytes anonymous (bound {ANONYMOUS_BYTES}), {} bytes resident, {} descriptors (bound {DESCRIPTORS}), \
         {} threads (bound {THREADS})",
        run.subject.lives.len(),
        most.anonymous,
        most.resident,
        most.descriptors,
        most.threads
    );
    let lines = run.subject.lives.iter().map(|life| lines_a_minute(&life.used)).max().unwrap_or_default();
    println!("  log lines in the busiest minute: {lines} (bound {LOG_LINES})");
    match run.subject.lives.iter().filter_map(|life| growth(&life.used)).max() {
        Some(growth) => println!("  anonymous memory, end of a life less its middle: at most {growth} bytes"),
        None => println!("  anonymous memory: no life was long enough to see whether it is flat"),
    }
}

fn faults(run: &SoakRun<'_>) {
    let mut by_kind: BTreeMap<&str, (u32, f64)> = BTreeMap::new();
    for fault in run.faults.iter().filter(|fault| fault.refused.is_none()) {
        let (n, slowest) = by_kind.entry(fault.plan.kind.name()).or_default();
        *n += 1;
        *slowest = slowest.max(fault.converged.unwrap_or(f64::INFINITY));
    }
    let listed: Vec<String> = by_kind.iter().map(|(kind, (n, slowest))| format!("{kind} {n} ({slowest:.1} s)")).collect();
    println!("  faults, with the longest time to converge: {}", listed.join(", "));
    let mut missing: BTreeMap<&str, &str> = NEVER_INJECTED.into();
    for kind in INJECTED.iter().filter(|kind| !by_kind.contains_key(kind.name())) {
        let refused = run.faults.iter().filter(|fault| fault.plan.kind == *kind).find_map(|fault| fault.refused.as_deref());
        missing.insert(kind.name(), refused.unwrap_or("not drawn in this time"));
    }
    for (kind, reason) in missing {
        println!("  not injected: {kind}: {reason}");
    }
}

fn violations(state: &BoardState, run: &SoakRun<'_>) -> bool {
    for (key, violation) in &state.violations {
        println!("VIOLATION {key} ({} times)", violation.times);
        violation.texts.iter().for_each(|text| println!("    {text}"));
    }
    match state.violations.len() {
        0 => println!("no violation"),
        n => println!("{n} violations; repeat with --seed {} --for {}s", run.options.seed, run.options.lasts.as_secs()),
    }
    state.violations.is_empty()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_of_sorted_values() {
        let values: Vec<f64> = (0..101).map(f64::from).collect();
        assert_eq!((quantile(&values, 0.5), quantile(&values, 0.99), quantile(&values, 1.0)), (50.0, 99.0, 100.0));
        assert!(quantile(&[], 0.5).is_nan());
    }

    #[test]
    fn long_lines_are_shortened() {
        assert_eq!(shortened("a\u{1b}b"), "ab");
        assert_eq!(shortened(&"x".repeat(200)).len(), LINE_MOST + 2);
    }
}
