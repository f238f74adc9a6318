use super::*;
use crate::loads::{Pattern, Ways};

const START: u64 = 1_000_000_000_000;
const MINUTE: u64 = 60_000_000;

fn world(rule: PidRule) -> World {
    World { pid_rule: rule, rounding: Rounding::Nearest, ..World::parse("[[gpus]]").unwrap() }
}

fn loads(demands: &[f64]) -> Vec<Load> {
    let load = |(i, demand): (usize, &f64)| {
        let (id, pid) = (i as u64, 100 + i as u32);
        Load {
            id,
            pid,
            start_time: 1,
            gpu: 0,
            demand: *demand,
            memory_bytes: 0,
            begin_us: START,
            end_us: Some(START + MINUTE),
            ways: Ways::default(),
        }
    };
    demands.iter().enumerate().map(load).collect()
}

static NONE: std::sync::LazyLock<Faults> = std::sync::LazyLock::new(Faults::default);

fn model<'a>(world: &'a World, gpu: usize, loads: &'a [Load]) -> Model<'a> {
    Model { world, unit: gpu.into(), loads, faults: &NONE }
}

#[test]
fn scheduled_demands_agree_in_samples_and_truth() {
    use crate::loads::Step;
    let world = world(PidRule::Last);
    let mut all = loads(&[1.0, 1.0]);
    all[1].ways.steps = [1.0, 0.0].map(|demand| Step { demand, lasts_us: Some(10_000_000) }).to_vec();
    let begin = all[1].begin_us;
    let model = model(&world, 0, &all);
    for (from_s, share) in [(0, 0.5), (10, 0.0), (20, 0.5), (30, 0.0)] {
        let (from, to) = (begin + from_s * 1_000_000, begin + (from_s + 10) * 1_000_000);
        let truth = model.truth(from, to);
        let [one, two] = [0, 1].map(|n| truth[n].seconds[0]);
        // The edge lies within one slice.
        assert!((one + two - 10.0).abs() < 1e-6 && (two - 10.0 * share).abs() < 0.5, "{from_s}: {one} {two}");
        assert!(share > 0.0 || two < 0.002 + 1e-9, "{from_s}: {two}");
        let pid = all[1].pid;
        let named = model.grid(from + 200_000, to).filter(|span| model.sample(*span).pid[0] == Some(pid)).count();
        assert_eq!(named > 10, share > 0.0, "{from_s}: named {named} times");
    }
}

#[test]
fn scheduled_loads_have_the_time_of_their_spans_and_others_the_rest() {
    use crate::loads::Ran;
    let world = world(PidRule::Last);
    // 0.7 ms of every 20 ms, and 8 ms of them; in phase with the slices.
    let mut all = loads(&[0.0, 0.0, 1.0]);
    for (load, (from, to)) in all.iter_mut().zip([(300, 1_000), (2_000, 10_000)]) {
        load.ways.scheduled = true;
        load.ways.ran = (0..3_000).map(|n| START + n * 20_000).map(|begin| Ran(begin + from, begin + to)).collect();
    }
    let truth = model(&world, 0, &all).truth(START, START + MINUTE);
    let seconds = [0, 1, 2].map(|n| truth[n].seconds[0]);
    assert!((seconds[0] - 2.1).abs() < 1e-6 && (seconds[1] - 24.0).abs() < 1e-6, "{seconds:?}");
    assert!((seconds.iter().sum::<f64>() - 60.0).abs() < 1e-6, "{seconds:?}");
    // Samples have the same busy time without the other load, and name the process at their instant.
    all.pop();
    for rule in [PidRule::Instant, PidRule::Last] {
        let world = World { pid_rule: rule, ..world.clone() };
        let model = model(&world, 0, &all);
        let samples: Vec<DriverSample> = model.grid(START + 1_000_000, START + MINUTE).map(|span| model.sample(span)).collect();
        let mean = samples.iter().map(|sample| f64::from(sample.util[0])).sum::<f64>() / samples.len() as f64;
        assert!((mean - 43.5).abs() < 0.5, "{rule:?}: {mean}");
        for sample in samples {
            let into = (sample.at_us - START) % 20_000;
            let expect = match (rule, into) {
                (_, 2_000..10_000) => Some(101),
                (_, 300..1_000) => Some(100),
                (PidRule::Instant, _) => None,
                (PidRule::Last, 1_000..2_000) => Some(100),
                (PidRule::Last, _) => Some(101),
            };
            // The last one of a slice is found up to the sample.
            assert_eq!(sample.pid[0], expect, "{rule:?} at {into}");
        }
    }
}

#[test]
fn demands_are_met_over_a_minute() {
    for (demands, expect) in [(&[0.6, 0.3, 0.1][..], &[36.0, 18.0, 6.0][..]), (&[0.1], &[6.0]), (&[1.0, 1.0], &[30.0, 30.0])] {
        let (world, loads) = (world(PidRule::Instant), loads(demands));
        let model = model(&world, 0, &loads);
        // After their end the loads own nothing.
        for (spent, want) in model.truth(START, START + 2 * MINUTE).iter().zip(expect) {
            let got = spent.seconds[0];
            assert!((got - want).abs() < 1.0, "{demands:?}: {got} s instead of {want} s");
            assert_eq!((got, got / 2.0), (spent.active, spent.seconds[1]));
        }
    }
}

#[test]
fn samples_sum_to_the_truth_and_name_only_processes_on_the_engine() {
    for rule in [PidRule::Instant, PidRule::Last] {
        let (world, loads) = (world(rule), loads(&[0.3, 0.1]));
        let model = model(&world, 0, &loads);
        let samples: Vec<DriverSample> = model.grid(START + 10_000_000, START + 50_000_000).map(|at| model.sample(at)).collect();
        assert!(samples.windows(2).all(|w| w[1].at_us - w[0].at_us == world.period_us));
        let busy: f64 = samples.iter().map(|t| f64::from(t.util[0]) / 100.0 * world.period_us as f64 / 1e6).sum();
        let (from, to) = (samples[0].at_us - world.period_us, samples[samples.len() - 1].at_us);
        let truth: f64 = model.truth(from, to).iter().map(|s| s.seconds[0]).sum();
        assert!((busy - truth).abs() < 0.1, "{busy} s instead of {truth} s");
        let named = samples.iter().filter(|t| t.pid[0].is_some()).count() as f64 / samples.len() as f64;
        assert!(if rule == PidRule::Last { named > 0.95 } else { (named - 0.4).abs() < 0.15 }, "{rule:?} {named}");
    }
}

/// As measured on a real GPU: 0.30 and 0.10 of the time, in bursts of 12 and 4 ms.
#[test]
fn bursts_decide_how_often_a_load_is_the_last_one() {
    let world = world(PidRule::Last);
    let mut loads = loads(&[0.3, 0.1]);
    (loads[0].ways.burst_us, loads[1].ways.burst_us) = (Some(12_000), Some(4_000));
    let model = model(&world, 0, &loads);
    let truth: Vec<f64> = model.truth(START, START + MINUTE).iter().map(|s| s.seconds[0]).collect();
    assert!((truth[0] / truth[1] - 3.0).abs() < 0.5, "{truth:?}");
    let samples: Vec<DriverSample> = model.grid(START, START + MINUTE).map(|at| model.sample(at)).collect();
    let named = |pid| samples.iter().filter(|s| s.pid[0] == Some(pid)).count() as f64;
    let ratio = named(100) / named(101);
    assert!((0.8..2.0).contains(&ratio), "named {ratio} to one, instead of 3 to 1");
    let cut = World { rounding: Rounding::Down, ..world.clone() };
    let cut = Model { world: &cut, ..model };
    let below = model.grid(START, START + MINUTE).filter(|span| cut.sample(*span).util[0] < model.sample(*span).util[0]).count();
    assert!(below * 3 > samples.len(), "about half of the samples are rounded up");
}

/// The definition of ownership, evaluated with every load in every slice.
fn naive_owner<'a>(model: &Model<'a>, slice: u64) -> Option<&'a Load> {
    let at = slice * SLICE_US;
    let in_force = |l: &&Load| l.gpu == model.unit.gpu && l.begin_us <= at && l.end_us.is_none_or(|end| at < end);
    let live: Vec<&Load> = model.loads.iter().filter(in_force).collect();
    let wanted: f64 = live.iter().map(|l| l.demand).sum();
    let drawn = (mix(model.world.seed, model.unit.gpu as u64 + 1, slice) >> 11) as f64 / (1u64 << 53) as f64 * wanted.max(1.0);
    let mut to = 0.0;
    live.into_iter().find(|l| {
        to += l.demand;
        drawn < to
    })
}

fn naive_sample(model: &Model<'_>, at_us: u64) -> DriverSample {
    let from = at_us - model.world.period_us(model.unit.gpu);
    let (mut busy_us, mut last) = (0, None);
    // Owners change at slices only.
    for us in (from..at_us).filter(|us| *us == from || us % SLICE_US == 0) {
        if let Some(load) = naive_owner(model, us / SLICE_US) {
            (busy_us, last) = (busy_us + ((us / SLICE_US + 1) * SLICE_US).min(at_us) - us, Some(load.pid));
        }
    }
    let instant = naive_owner(model, at_us / SLICE_US).map(|l| l.pid);
    let util = (busy_us as f64 * 100.0 / (at_us - from) as f64).round() as u32;
    let pid = if *model.world.pid_rule(model.unit.gpu) == PidRule::Last { last } else { instant };
    DriverSample { at_us, util: [util, util / 2, 0, 0, 0, 0], pid: [pid, pid, None, None, None, None] }
}

/// 300 loads on two GPUs over 4 s, of all lengths from less than a slice, with begins out of order, some without end.
fn many_loads(seed: u64) -> Vec<Load> {
    let load = |id: u64| {
        let draw = |what, below| mix(seed, id, what) % below;
        let begin_us = START + id / 2 * 25_000 + draw(1, 60_000);
        let end_us = (draw(2, 50) > 0).then(|| begin_us + [3_000, 60_000, 700_000][draw(3, 3) as usize] * draw(4, 1000) / 1000);
        let (pid, gpu, demand) = (100 + draw(5, 40) as u32, draw(6, 2) as usize, (1 + draw(7, 900)) as f64 / 1000.0);
        Load { id, pid, start_time: 1, gpu, demand, memory_bytes: 0, begin_us, end_us, ways: Ways::default() }
    };
    (0..300).map(load).collect()
}

#[test]
fn results_do_not_depend_on_skipping_loads_that_do_not_overlap() {
    for (rule, seed) in [(PidRule::Instant, 1), (PidRule::Last, 2)] {
        let world = World {
            pid_rule: rule,
            seed,
            rounding: Rounding::Nearest,
            ..World::parse("[[gpus]]\n[[gpus]]\nperiod_us = 20001").unwrap()
        };
        let loads = many_loads(seed);
        for gpu in 0..2 {
            let model = model(&world, gpu, &loads);
            let (from, to) = (START + 150_001, START + 3_700_777);
            for span in model.grid(from, to) {
                let at = span.at_us;
                assert_eq!(model.sample(span), naive_sample(&model, at));
                // The same without the loads that are reported as not needed.
                let until = model.needless_until(at - 1);
                let needed: Vec<Load> = loads.iter().filter(|l| l.end_us.is_none_or(|end| end > until)).cloned().collect();
                assert!(at < START + 1_000_000 || needed.len() < loads.len());
                assert_eq!(model.sample(span), Model { loads: &needed, ..model }.sample(span));
            }
            let mut us: Vec<u64> = vec![0; loads.len()];
            for slice in from / SLICE_US..to.div_ceil(SLICE_US) {
                if let Some(load) = naive_owner(&model, slice) {
                    us[load.id as usize] += ((slice + 1) * SLICE_US).min(to) - (slice * SLICE_US).max(from);
                }
            }
            let expect: Vec<(u64, f64)> =
                loads.iter().filter(|l| l.gpu == gpu).map(|l| (l.id, us[l.id as usize] as f64 / 1e6)).collect();
            let truth: Vec<(u64, f64)> = model.truth(from, to).iter().map(|s| (s.load.id, s.seconds[0])).collect();
            assert_eq!(truth, expect);
            assert!(truth.iter().filter(|(_, seconds)| *seconds > 0.0).count() > 50);
        }
    }
}

#[test]
fn with_jitter_samples_stay_in_order_and_spans_adjoin() {
    let world = World::parse("jitter_us = 40000\n[[gpus]]").unwrap();
    let loads = loads(&[0.5]);
    let spans: Vec<Span> = model(&world, 0, &loads).grid(START, START + MINUTE).collect();
    assert!((355..=363).contains(&spans.len()));
    assert!(spans.windows(2).all(|w| w[0].at_us == w[1].from_us && w[1].at_us - w[1].from_us >= world.period_us / 2));
    let gaps: Vec<u64> = spans.iter().map(|s| s.at_us - s.from_us).collect();
    assert!(*gaps.iter().max().unwrap() > 200_000 && *gaps.iter().min().unwrap() < 130_000);
    // The samples do not depend on where the iteration begins.
    for from in (START..START + 1_000_000).step_by(7_777) {
        let late: Vec<Span> = model(&world, 0, &loads).grid(from, START + 2_000_000).collect();
        assert!(late[0].at_us > from && late.iter().all(|s| spans.contains(s)));
    }
}

#[test]
fn engines_have_independent_owners() {
    let world = world(PidRule::Instant);
    let mut loads = loads(&[0.5, 0.2]);
    loads[0].ways = Ways { enc: 0.3, ofa: 0.05, memory: Some(0.1), ..Ways::default() };
    loads[1].ways = Ways { enc: 0.2, dec: 0.7, jpeg: 0.4, ..Ways::default() };
    let model = model(&world, 0, &loads);
    let spent = model.truth(START, START + MINUTE);
    // The second load uses half of the memory while it computes, when the first is not on it.
    let expect = [[30.0, 6.0, 18.0, 0.0, 0.0, 3.0], [12.0, 5.4, 12.0, 42.0, 24.0, 0.0]];
    for (spent, expect) in spent.iter().zip(expect) {
        assert!(spent.seconds.iter().zip(expect).all(|(got, want)| (got - want).abs() < 1.0), "{:?}", spent.seconds);
    }
    let samples: Vec<DriverSample> = model.grid(START + 1_000_000, START + 21_000_000).map(|s| model.sample(s)).collect();
    let both = samples.iter().filter(|t| t.pid[0].zip(t.pid[2]).is_some_and(|(sm, enc)| sm != enc)).count();
    assert!(both > 5, "{both} samples name different processes");
}

#[test]
fn under_mps_several_loads_run_at_once_and_one_is_named() {
    let world = world(PidRule::Instant);
    let mut loads = loads(&[0.6, 0.5, 0.2]);
    loads[0].ways.mps = true;
    loads[1].ways.mps = true;
    let model = model(&world, 0, &loads);
    let spent = model.truth(START, START + MINUTE);
    let busy: f64 = spent.iter().map(|s| s.seconds[0]).sum();
    // The combined demand of the two is 1 - 0.4 * 0.5 = 0.8 of the GPU.
    assert!((busy - 60.0).abs() < 0.5 && (spent[0].active - 36.0).abs() < 1.0 && (spent[1].active - 30.0).abs() < 1.0);
    assert!((spent[2].seconds[0] - 12.0).abs() < 1.0 && spent[0].seconds[0] < spent[0].active - 5.0);
    assert!(model.grid(START + 1_000_000, START + 9_000_000).all(|s| model.sample(s).pid[0].is_some()));
}

#[test]
fn the_truth_includes_patterns_and_outages() {
    let world = world(PidRule::Instant);
    let mut loads = loads(&[1.0]);
    loads[0].ways.pattern = Some(Pattern { every_us: 100_000, on_us: 40_000, phase_us: 10_000 });
    let busy = |faults: &Faults| {
        let model = Model { faults, ..model(&world, 0, &loads) };
        let samples = model.grid(START + 1_000_000, START + 11_000_000).count();
        (model.truth(START, START + MINUTE)[0].seconds[0], samples)
    };
    let fault = |kind| {
        let (from_us, until_us) = (START + 2_000_000, Some(START + 7_000_000));
        Faults::new(vec![crate::faults::Fault { from_us, until_us, ..crate::faults::Fault::of_kind(kind) }])
    };
    let near = |(seconds, samples): (f64, usize), want: f64, wanted_samples: usize| {
        assert!((seconds - want).abs() < 0.1 && samples.abs_diff(wanted_samples) <= 1, "{seconds} {samples}");
    };
    use crate::faults::FaultKind;
    near(busy(&NONE), 24.0, 60);
    near(busy(&fault(FaultKind::Lost)), 22.0, 30);
    near(busy(&fault(FaultKind::Freeze)), 24.0, 30);
    near(busy(&fault(FaultKind::Stall)), 24.0, 60);
}

#[test]
fn mig_devices_have_independent_owners() {
    let world = World::parse("[[gpus]]\nmig = ['MIG-a', 'MIG-b']").unwrap();
    let mut loads = loads(&[0.5, 0.5]);
    (loads[0].ways.mig, loads[1].ways.mig) = (Some(0), Some(1));
    let model_of = |mig| Model { unit: Unit { gpu: 0, mig }, ..model(&world, 0, &loads) };
    let seconds = |mig| model_of(mig).truth(START, START + MINUTE).iter().map(|s| (s.load.pid, s.seconds[0])).collect::<Vec<_>>();
    assert!(seconds(None).is_empty());
    let (a, b) = (seconds(Some(0)), seconds(Some(1)));
    assert!(a.len() == 1 && b.len() == 1 && a[0].0 != b[0].0 && a[0].1 != b[0].1 && (a[0].1 - 30.0).abs() < 1.0);
}
