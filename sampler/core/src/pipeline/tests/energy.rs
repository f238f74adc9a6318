use super::*;
use crate::device::{DeviceReadings, MigMode};
use crate::snapshot::UnattributedEnergy;

/// A GPU that draws 100 W, and 200 W more while it is busy. Its counter is read with each sixth sample.
struct EnergyCounter {
    joules: f64,
    k: usize,
}

impl EnergyCounter {
    fn new() -> Self {
        Self { joules: 1e6, k: 0 }
    }

    fn feed(&mut self, core: &mut Core, samples: impl Iterator<Item = (u32, Option<u32>)>) {
        for (busy, pid) in samples {
            let part = if (1..100).contains(&busy) { f64::from(busy) + 0.5 } else { f64::from(busy) } / 100.0;
            self.joules += (100.0 + 200.0 * part) * PERIOD as f64 * 1e-9;
            let mut batch = sample_batch(self.k, busy, pid, 1_000_000);
            let readings = DeviceReadings { energy_joules: Some(self.joules), ..DeviceReadings::default() };
            batch.readings = self.k.is_multiple_of(6).then_some(readings);
            core.observe(Observation::from(batch));
            advance_time(core, taken(self.k) + 2_000_000);
            self.k += 1;
        }
    }
}

fn joules(snapshot: &Snapshot) -> (Vec<f64>, UnattributedEnergy) {
    let containers = snapshot.containers.iter().flat_map(|c| &c.gpus).map(|pair| pair.energy_joules.unwrap());
    (containers.collect(), snapshot.gpus[0].unattributed_energy.unwrap())
}

#[test]
fn energy_is_attributed_as_the_busy_time_that_waits_for_its_user() {
    let (mut core, mut counter) = (core(), EnergyCounter::new());
    counter.feed(&mut core, (0..120).map(|_| (0, None)));
    // Of each 10 samples of 80 % three name the first container, one the second, one a host process, the others wait.
    let pid = |k: u32| [Some(100), None, None, Some(100), Some(102), Some(101), Some(100), None, None, None][k as usize % 10];
    counter.feed(&mut core, (0..600).map(|k| (80, pid(k))));
    let busy_s = 600.0 * PERIOD as f64 * 1e-9 * 0.805;
    // Of the last samples some wait for 10 s, and the energy with them.
    let before = joules(&core.snapshot());
    assert!(before.0[0] > 1_000.0 && before.0[0] < 0.6 * 200.0 * busy_s, "{before:?}");
    counter.feed(&mut core, (0..120).map(|_| (0, None)));
    let snapshot = core.snapshot();
    let (of_containers, unattributed) = joules(&snapshot);
    let sum = of_containers.iter().chain(&unattributed.reasons).sum::<f64>() + unattributed.idle;
    // All but the last 12 s.
    let spent = counter.joules - 1e6;
    assert!(sum <= spent && spent - sum < 13.5 * 100.0, "{sum} of {spent}");
    let of_users: f64 = of_containers.iter().chain(&unattributed.reasons).sum();
    assert!((of_users / (200.0 * busy_s) - 1.0).abs() < 0.01, "{of_users} {busy_s}");
    // As the seconds are divided.
    let seconds = seconds(&snapshot);
    let host = (snapshot.gpus[0].unattributed[Reason::Host as usize], unattributed.reasons[Reason::Host as usize]);
    for (seconds, joules) in seconds.into_iter().zip(of_containers).chain([host]) {
        assert!(seconds > 5.0 && (joules / (200.0 * seconds) - 1.0).abs() < 0.01, "{joules} J for {seconds} s");
    }
}

#[test]
fn energy_stays_when_the_gpu_is_gone_and_continues_when_it_returns() {
    let (mut core, mut counter) = (core(), EnergyCounter::new());
    counter.feed(&mut core, (0..300).map(|k| (if k < 60 { 0 } else { 90 }, (k >= 60).then_some(100))));
    let gone = BootNs(taken(counter.k));
    core.observe(Observation::GpuGone { gpu: 0, at: gone });
    advance_time(&mut core, taken(counter.k) + 1);
    let (of_containers, _) = joules(&core.snapshot());
    // All intervals are divided at once; of the last one the energy is not known.
    assert!(of_containers[0] > 0.95 * 200.0 * 0.905 * 240.0 * 0.167, "{of_containers:?}");
    counter.k += 600;
    advance_time(&mut core, taken(counter.k));
    assert_eq!(joules(&core.snapshot()).0, of_containers);
    // The driver was loaded again, and its counter begins at 0.
    counter.joules = 500.0;
    core.observe(Observation::GpuFound { gpu: 0, info: info(), at: BootNs(taken(counter.k)) });
    counter.feed(&mut core, (0..200).map(|_| (0, None)));
    let (after, unattributed) = joules(&core.snapshot());
    assert!(after[0] - of_containers[0] < 50.0, "{after:?} {of_containers:?}");
    assert!(unattributed.reasons[Reason::Lost as usize] < 400.0, "{unattributed:?}");
}

#[test]
fn without_an_energy_counter_and_in_mig_mode_energy_is_absent() {
    let of = |core: &Core| {
        let snapshot = core.snapshot();
        let pairs: Vec<_> = snapshot.containers.iter().flat_map(|c| &c.gpus).map(|pair| pair.energy_joules).collect();
        (snapshot.gpus[0].unattributed_energy, pairs)
    };
    let mut core = core();
    feed(&mut core, (0..100).map(|_| (50, Some(100))));
    assert_eq!(of(&core), (None, vec![None]));
    let mut core = Core::default();
    prepare(&mut core);
    let info = GpuInfo { mig_mode: MigMode::Enabled, ..GpuInfo::clone(&info()) };
    core.observe(Observation::GpuFound { gpu: 0, info: Arc::new(info), at: BootNs(taken(0)) });
    EnergyCounter::new().feed(&mut core, (0..100).map(|_| (50, Some(100))));
    assert_eq!(of(&core), (None, vec![]));
}
