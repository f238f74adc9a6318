//! Whole screens as golden files; `GOLDEN=write cargo test` rewrites them.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use clap::ValueEnum as _;
use ratatui::Terminal;
use ratatui::backend::TestBackend;
use ratatui::crossterm::event::{KeyCode, KeyModifiers};

use super::super::model::Action;
use super::super::once;
use super::*;
use crate::export::live::{Degraded, LiveDocument, LiveOther, LiveUser, LiveWaits};

fn check(name: &str, text: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/cli/top/golden").join(name);
    if std::env::var_os("GOLDEN").is_some_and(|how| how == "write") {
        std::fs::write(&path, text).unwrap();
    }
    let expect = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(text == expect, "{name} differs from its golden file (GOLDEN=write rewrites it); it is now\n{text}");
}

fn text(s: &str) -> Option<String> {
    Some(s.to_owned())
}

fn gpu(index: u32, busy: Option<f64>) -> LiveGpu {
    let seconds = |all: &[(&str, f64)]| Some(all.iter().map(|(name, s)| ((*name).to_owned(), *s)).collect::<BTreeMap<_, _>>());
    LiveGpu {
        uuid: format!("GPU-{index}"),
        index,
        model: "Tesla V100-SXM2-16GB".into(),
        is_leaf: true,
        utilization_ratio: busy,
        coactive_ratio: busy.map(|busy| busy / 2.0),
        memory_used_bytes: Some(14 << 30),
        memory_total_bytes: Some(16 << 30),
        power_watts: Some(231.4),
        temperature_celsius: Some(65.0),
        time_seconds: seconds(&[("busy", 40.0), ("idle", 2.0)]),
        unattributed_seconds: seconds(&[("host", 2.5), ("no_pid", 0.5)]),
        ..LiveGpu::default()
    }
}

fn user(n: u64, pod: &str, share: Option<f64>) -> LiveUser {
    LiveUser {
        namespace: text(if pod.starts_with("inference") { "prod" } else { "default" }),
        pod: text(pod),
        container: text("main"),
        image: text("registry.example/main:1"),
        container_id: format!("{n:064x}"),
        id: format!("/kubepods/{n:064x}"),
        uuid: "GPU-0".into(),
        index: Some(0),
        duty_cycle_percent: share,
        duty_cycle_stderr: share.map(|_| 6.4),
        gpu_seconds: 100.0 + n as f64,
        gpu_seconds_stderr: 1.25,
        samples: 600,
        memory_used_bytes: Some(n << 30),
        active_seconds: 40.0,
        coactive_seconds: 30.0,
        ..LiveUser::default()
    }
}

/// The document of one second of a minute in which three users share a GPU.
fn document(second: u32) -> LiveDocument {
    let mut trainer = user(1, "trainer-0", Some(60.0));
    let (inference, mut bare) = (user(2, "inference-7c9d5b8f4-x2k4q", Some(30.0)), user(3, "", None));
    let other = LiveOther {
        kind: "container".into(),
        namespace: inference.namespace.clone(),
        pod: inference.pod.clone(),
        container: inference.container.clone(),
        container_id: text(&inference.container_id),
        seconds: f64::from(second) * 0.25,
        ..LiveOther::default()
    };
    let host = LiveOther { kind: "host".into(), seconds: f64::from(second) * 0.05, ..LiveOther::default() };
    trainer.contended_by = vec![other, host];
    trainer.contention_seconds = f64::from(second) * 0.3;
    // Not a pod, never sampled, and with terminal control characters in its name.
    (bare.namespace, bare.pod, bare.container) = (None, None, None);
    (bare.name, bare.memory_used_bytes, bare.gone) = (text("build\x1b[31m"), None, true);
    LiveDocument {
        time: format!("2026-01-02T03:04:{second:02}Z"),
        version: "0.1.0".into(),
        node: text("node-1"),
        gpus: vec![gpu(0, Some(0.97)), gpu(1, None)],
        users: vec![bare, inference, trainer],
        ..LiveDocument::default()
    }
}

fn model() -> Model {
    Model::new("http://127.0.0.1:9836", Duration::from_secs(1), Sort::Share, "")
}

fn after_a_minute() -> Model {
    let mut model = model();
    for second in 0..60 {
        let mut live = document(second);
        live.users[1].duty_cycle_percent = Some(f64::from(second) / 59.0 * 30.0);
        model.update(live);
    }
    model
}

fn screen(model: &mut Model, width: u16, height: u16) -> String {
    let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
    terminal.draw(|frame| draw(frame, model, true)).unwrap();
    let buffer = terminal.backend().buffer();
    let line = |y| (0..width).map(|x| buffer[(x, y)].symbol()).collect::<String>().trim_end().to_owned() + "\n";
    (0..height).map(line).collect()
}

fn press(model: &mut Model, codes: &[KeyCode]) {
    for code in codes {
        assert_eq!(model.handle_key((*code).into()), None);
    }
}

#[test]
fn three_users_of_a_gpu_are_drawn_wide_and_narrow() {
    check("wide.txt", &screen(&mut after_a_minute(), 120, 30));
    check("narrow.txt", &screen(&mut after_a_minute(), 60, 20));
}

#[test]
fn pressure_is_a_column_where_wait_probes_are_on() {
    let mut live = document(40);
    live.users[1].waits = Some(LiveWaits { wait_seconds: 5.0, probed_seconds: 20.0, ..LiveWaits::default() });
    live.users[2].waits = Some(LiveWaits {
        wait_seconds: 22.4,
        probed_seconds: 40.0,
        pressure_ratio: Some(0.31),
        pressure_stderr_ratio: Some(0.04),
    });
    live.users[2].contended_by[0].pressure_ratio = Some(0.26);
    let mut model = model();
    model.update(live.clone());
    check("waits.txt", &screen(&mut model, 120, 20));
    check("once-waits.txt", &once::table(&live, Sort::Share, "", None, false));
    let sorts = |model: &mut Model| -> Vec<Sort> {
        let mut press_s = || {
            press(model, &[KeyCode::Char('s')]);
            model.sort
        };
        (0..Sort::value_variants().len()).map(|_| press_s()).collect()
    };
    assert!(sorts(&mut model).contains(&Sort::Pressure));
    model.sort = Sort::Pressure;
    model.update(live.clone());
    assert_eq!(model.rows[0].user.waits.and_then(|waits| waits.pressure_ratio), Some(0.31));
    let mut without = after_a_minute();
    without.sort = Sort::Pressure;
    assert!(!sorts(&mut without).contains(&Sort::Pressure), "there is no such column");
    for width in 20..130 {
        let shown = once::table(&live, Sort::Share, "", Some(width), false);
        assert!(shown.lines().all(|line| line.width() <= width.max(45)), "{width}\n{shown}");
    }
}

#[test]
fn an_empty_document_is_explained() {
    let mut empty = document(0);
    (empty.gpus, empty.users) = (Vec::new(), Vec::new());
    empty.degraded = vec![Degraded { what: "nvml".into(), message: "no library; install the NVIDIA driver".into() }];
    let mut model = model();
    assert!(screen(&mut model, 80, 10).contains("connecting to http://127.0.0.1:9836"));
    model.update(empty);
    check("empty.txt", &screen(&mut model, 80, 12));
}

#[test]
fn an_unreachable_agent_is_reported_and_the_last_document_stays() {
    let error = "no agent is reachable at http://127.0.0.1:9836; start `gpu-sampler run`, or name an agent with --agent: \
                 Connection refused";
    let mut model = model();
    model.disconnect(error.into());
    check("disconnected.txt", &screen(&mut model, 80, 12));
    model.update(document(1));
    assert!(!screen(&mut model, 80, 12).contains("DISCONNECTED"));
    model.disconnect(error.into());
    let last = screen(&mut model, 80, 20);
    assert!(last.contains("DISCONNECTED") && last.contains("trainer-0"), "{last}");
}

#[test]
fn keys_scroll_select_sort_and_filter_six_hundred_rows() {
    let mut live = document(1);
    live.users = (0..600).map(|n| user(n, &format!("pod-{n:03}"), Some(50.0))).collect();
    live.gpus = (0..16).map(|n| gpu(n, Some(0.5))).collect();
    let mut model = model();
    model.update(live.clone());
    check("many.txt", &screen(&mut model, 120, 30));
    press(&mut model, &[KeyCode::End]);
    assert!(screen(&mut model, 120, 30).contains("pod-599"));
    press(&mut model, &[KeyCode::PageUp, KeyCode::Up, KeyCode::Home, KeyCode::Down, KeyCode::Down]);
    assert_eq!(model.selected(), 2);
    // The selection follows the container when its row moves.
    let selected = model.rows[model.selected()].key();
    press(&mut model, &[KeyCode::Char('s')]);
    assert_eq!((model.sort, model.rows[model.selected()].key()), (Sort::Seconds, selected));
    press(&mut model, &[KeyCode::Char('/'), KeyCode::Char('P'), KeyCode::Char('D'), KeyCode::Backspace]);
    press(&mut model, &"od-59 gpu 0".chars().map(KeyCode::Char).collect::<Vec<_>>());
    press(&mut model, &[KeyCode::Enter]);
    assert_eq!((model.rows.len(), &*model.filter), (10, "Pod-59 gpu 0"));
    press(&mut model, &[KeyCode::Char('/'), KeyCode::Char('x')]);
    assert!(screen(&mut model, 80, 20).contains("No row matches the filter"));
    press(&mut model, &[KeyCode::Esc]);
    assert_eq!(model.rows.len(), 10);
    press(&mut model, &[KeyCode::Char('p')]);
    live.users.clear();
    model.update(live);
    assert_eq!(model.rows.len(), 10);
    assert!(screen(&mut model, 80, 20).contains("PAUSED"));
    press(&mut model, &[KeyCode::Char('?')]);
    check("help.txt", &screen(&mut model, 80, 30));
    press(&mut model, &[KeyCode::Char('q')]);
    assert_eq!(model.handle_key(KeyCode::Char('q').into()), Some(Action::Quit));
    let interrupt = ratatui::crossterm::event::KeyEvent::new(KeyCode::Char('c'), KeyModifiers::CONTROL);
    assert_eq!(model.handle_key(interrupt), Some(Action::Quit));
}

#[test]
fn every_terminal_size_is_drawn_without_a_panic() {
    let mut model = after_a_minute();
    for (width, height) in (1..140).flat_map(|width| (1..40).step_by(3).map(move |height| (width, height))) {
        screen(&mut model, width, height);
    }
    model.help = true;
    screen(&mut model, 24, 6);
}

#[test]
fn the_single_table_fits_the_width_and_obeys_sort_and_filter() {
    let live = document(40);
    let table = |sort, filter: &str, width| once::table(&live, sort, filter, width, false);
    check("once.txt", &table(Sort::Share, "", None));
    for width in 20..130 {
        let shown = table(Sort::Waiting, "", Some(width));
        assert!(shown.lines().all(|line| line.width() <= width.max(45)), "{width}\n{shown}");
    }
    check("once-60.txt", &table(Sort::Waiting, "", Some(60)));
    assert!(table(Sort::Share, "no such", None).contains("No row matches the filter."));
}

#[test]
fn the_single_table_names_gpus_that_are_gone() {
    let mut live = document(40);
    let gone = |live: &LiveDocument| once::table(live, Sort::Share, "", None, false);
    live.gpus[1].gone = true;
    let one = gone(&live);
    assert!(one.contains("GPU 0 GPU-0: busy 97") && one.contains("GPU 1 GPU-1: gone\n"), "{one}");
    assert!(!one.contains("No GPU is visible"), "{one}");
    live.gpus[0].gone = true;
    let all = gone(&live);
    assert!(all.contains("GPU 0 GPU-0: gone\nGPU 1 GPU-1: gone\nNo GPU is visible; run `gpu-sampler doctor`"), "{all}");
}
