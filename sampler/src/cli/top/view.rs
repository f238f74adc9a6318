//! Draws the model. What has no room is left out, the least needed first; without colours nothing is lost.

use ratatui::Frame;
use ratatui::buffer::Buffer;
use ratatui::layout::{Alignment, Rect};
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::{Line, Span};
use ratatui::widgets::{Block, Clear, Paragraph, Widget as _, Wrap};
use unicode_width::UnicodeWidthStr as _;

use super::model::Model;
use super::rows::{Sort, TopRow};
use super::words::{DASH, bytes, fit, left, name_of_other, percent, right, share, short};
use crate::cli::output::harmless;
use crate::export::live::LiveGpu;

/// Below this there is no table to speak of.
const LEAST: (u16, u16) = (24, 6);
/// With less, the row that is looked at is not told in whole.
const DETAIL_FROM: u16 = 18;
const GAP: usize = 2;
const HELP: [(&str, &str); 8] = [
    ("q, Esc", "quit"),
    ("s", "sort by the next column"),
    ("/", "filter: words that a row must have; Enter keeps it, Esc undoes it"),
    ("p, space", "stop the picture; the agent is still asked"),
    ("arrows, PgUp, PgDn, Home, End", "look at another row"),
    ("SHARE %", "of the last 10 s, ± one standard error"),
    ("CONTENTION", "GPU-seconds per second, over the last minute, that others got while it was active and the GPU saturated"),
    ("shared", "part of the last 10 s in which two users or more were active"),
];

#[derive(Clone, Copy)]
struct Paint(bool);

impl Paint {
    fn of(self, colour: Color) -> Style {
        if self.0 { Style::new().fg(colour) } else { Style::new() }
    }

    fn accent(self) -> Style {
        self.of(Color::Cyan)
    }

    fn waits(self) -> Style {
        self.of(Color::Yellow)
    }

    fn bad(self) -> Style {
        self.of(Color::Red).add_modifier(Modifier::BOLD)
    }

    fn soft(self) -> Style {
        Style::new().add_modifier(Modifier::DIM)
    }
}

const BOLD: Style = Style::new().add_modifier(Modifier::BOLD);

pub fn draw(frame: &mut Frame<'_>, model: &mut Model, colours: bool) {
    let (area, paint) = (frame.area(), Paint(colours));
    let buf = frame.buffer_mut();
    if area.width < LEAST.0 || area.height < LEAST.1 {
        Paragraph::new("too small; q quits").render(area, buf);
        return;
    }
    let mut top = lines(buf, area, 0, head(model, area, paint));
    let detail = if area.height >= DETAIL_FROM && !model.rows.is_empty() { 3 } else { 0 };
    let bottom = area.height - 1 - detail;
    table(buf, Rect { y: top, height: bottom.saturating_sub(top), ..area }, model, paint);
    if detail > 0 {
        top = bottom;
        lines(buf, area, top, details(model, usize::from(area.width), paint));
    }
    lines(buf, area, area.height - 1, vec![foot(model, usize::from(area.width), paint)]);
    if model.help {
        help(buf, area);
    }
}

fn lines(buf: &mut Buffer, area: Rect, mut y: u16, all: Vec<Line<'_>>) -> u16 {
    for line in all {
        if y < area.height {
            buf.set_line(area.x, area.y + y, &line, area.width);
            y += 1;
        }
    }
    y
}

/// Title, what is wrong, and a line for each GPU, in a third of the screen at most.
fn head(model: &Model, area: Rect, paint: Paint) -> Vec<Line<'static>> {
    let width = usize::from(area.width);
    let mut all = vec![title(model, width, paint)];
    let most = usize::from(area.height / 3).max(2);
    if let Some(why) = &model.away {
        let words = format!("AWAY: {}; this keeps trying", harmless(why));
        all.extend(wrap(&words, width, 4).into_iter().map(|line| Line::styled(line, paint.bad())));
    }
    let Some(live) = &model.live else { return all };
    let wrong = live.degraded.len();
    for one in live.degraded.iter().take(2) {
        let words = format!("degraded: {}: {}", harmless(&one.what), harmless(&one.message));
        all.extend(wrap(&words, width, 2).into_iter().map(|line| Line::styled(line, paint.waits())));
    }
    if wrong > 2 {
        all.push(Line::styled(format!("and {} more that do not work: see the agent's page or log", wrong - 2), paint.waits()));
    }
    let gpus: Vec<&LiveGpu> = live.gpus.iter().filter(|gpu| !gpu.gone).collect();
    let room = most.saturating_sub(all.len()).max(1);
    let shown = if gpus.len() > room { room.saturating_sub(1).max(1) } else { gpus.len() };
    for gpu in &gpus[..shown] {
        all.push(gauge(gpu, model, width, paint));
    }
    if gpus.len() > shown {
        all.push(Line::styled(format!("and {} more GPUs", gpus.len() - shown), paint.soft()));
    }
    if gpus.is_empty() {
        let words = if wrong > 0 { "No GPU is seen." } else { "No GPU is seen; `gpu-sampler doctor` says why." };
        all.push(Line::raw(words));
    }
    all
}

/// Broken at blanks; what does not fit into `most` lines is cut.
fn wrap(text: &str, width: usize, most: usize) -> Vec<String> {
    let (mut all, mut line) = (Vec::new(), String::new());
    for word in text.split(' ') {
        if !line.is_empty() && line.width() + 1 + word.width() > width && all.len() + 1 < most {
            all.push(std::mem::take(&mut line));
        }
        if !line.is_empty() {
            line.push(' ');
        }
        line += word;
    }
    all.push(line);
    all.iter().map(|line| fit(line, width)).collect()
}

fn title(model: &Model, width: usize, paint: Paint) -> Line<'static> {
    let mut spans = vec![Span::styled("gpu-sampler top", BOLD)];
    let mut say = |text: String, style: Style| {
        let taken: usize = spans.iter().map(|span| span.content.width()).sum();
        if taken + 2 + text.width() <= width {
            spans.push(Span::styled(format!("  {text}"), style));
        }
    };
    if model.paused {
        say("PAUSED".into(), paint.waits().add_modifier(Modifier::BOLD));
    }
    if let Some(live) = &model.live {
        say(harmless(live.node.as_deref().unwrap_or(&model.agent)), Style::new());
        // RFC 3339, of which the time of the day is enough.
        say(live.time.get(11..19).map(|time| format!("{time} UTC")).unwrap_or_default(), Style::new());
        let rows = if model.rows.len() < model.total {
            format!("{} of {} rows", model.rows.len(), model.total)
        } else {
            format!("{} rows", model.total)
        };
        say(rows, Style::new());
        say(format!("agent {}", harmless(&live.version)), paint.soft());
        say(format!("every {}", humantime::format_duration(model.interval)), paint.soft());
    } else if model.away.is_none() {
        say(format!("asking {}", harmless(&model.agent)), paint.soft());
    }
    Line::from(spans)
}

fn bar(ratio: Option<f64>, width: usize) -> (String, String) {
    let full = ratio.map_or(0, |ratio| (ratio.clamp(0.0, 1.0) * width as f64).round() as usize);
    ("█".repeat(full), "░".repeat(width - full))
}

fn gauge(gpu: &LiveGpu, model: &Model, width: usize, paint: Paint) -> Line<'static> {
    let name = if gpu.gpu_uuid.is_some() { format!("GPU {}m", gpu.index) } else { format!("GPU {}", gpu.index) };
    let mut spans = vec![Span::styled(left(&name, 7), BOLD)];
    let mut taken = 7;
    if gpu.is_leaf {
        let (full, rest) = bar(gpu.utilization_ratio, if width >= 100 { 20 } else { 10 });
        taken += full.width() + rest.width();
        spans.extend([Span::styled(full, paint.accent()), Span::styled(rest, paint.soft())]);
        let busy = right(&percent(gpu.utilization_ratio), 6);
        taken += busy.width();
        spans.push(Span::styled(busy, BOLD));
    }
    let memory = format!("{} / {}", bytes(gpu.memory_used_bytes), bytes(gpu.memory_total_bytes));
    // What is busy and in no row: of the host, of nobody known, or waiting for labels.
    let credited = model.live.iter().flat_map(|live| &live.users).filter(|user| user.uuid == gpu.uuid);
    let credited: f64 = credited.filter_map(|user| user.duty_cycle_percent).sum();
    let nobody = gpu.utilization_ratio.map(|ratio| (ratio - credited / 100.0).max(0.0)).filter(|ratio| *ratio >= 0.01);
    let model_name = harmless(&gpu.model);
    let all = [
        gpu.is_leaf.then_some((memory, Style::new())),
        Some((gpu.power_watts.map_or(DASH.into(), |watts| format!("{watts:.0} W")), Style::new())),
        Some((gpu.temperature_celsius.map_or(DASH.into(), |celsius| format!("{celsius:.0} °C")), Style::new())),
        gpu.coactive_ratio.map(|ratio| (format!("shared {}", percent(Some(ratio))), Style::new())),
        nobody.map(|ratio| (format!("no container {}", percent(Some(ratio))), paint.waits())),
        Some((model_name, paint.soft())),
    ];
    for (text, style) in all.into_iter().flatten() {
        if taken + GAP + text.width() > width {
            break;
        }
        taken += GAP + text.width();
        spans.push(Span::styled(format!("  {text}"), style));
    }
    Line::from(spans)
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Column {
    Name,
    Gpu,
    Share,
    Minute,
    Seconds,
    Memory,
    Waited,
    By,
}

impl Column {
    fn head(self) -> (&'static str, Option<Sort>) {
        match self {
            Column::Name => ("CONTAINER", Some(Sort::Name)),
            Column::Gpu => ("GPU", None),
            Column::Share => ("SHARE %", Some(Sort::Share)),
            Column::Minute => ("LAST MINUTE", None),
            Column::Seconds => ("GPU-SECONDS", Some(Sort::Seconds)),
            Column::Memory => ("MEMORY", Some(Sort::Memory)),
            Column::Waited => ("CONTENTION", Some(Sort::Waiting)),
            Column::By => ("WITH", None),
        }
    }

    fn is_number(self) -> bool {
        matches!(self, Column::Share | Column::Seconds | Column::Memory | Column::Waited)
    }
}

/// Columns with their widths: what this much room is used for.
fn columns(width: usize) -> Vec<(Column, usize)> {
    use Column::{By, Gpu, Memory, Minute, Name, Seconds, Share, Waited};
    let fixed: &[(Column, usize)] = match width {
        120.. => &[(Gpu, 3), (Share, 11), (Minute, 15), (Seconds, 13), (Memory, 9), (Waited, 10)],
        90.. => &[(Gpu, 3), (Share, 11), (Minute, 12), (Seconds, 13), (Waited, 10)],
        70.. => &[(Gpu, 3), (Share, 11), (Minute, 12), (Waited, 10)],
        56.. => &[(Gpu, 3), (Share, 11), (Minute, 6), (Waited, 10)],
        _ => &[(Gpu, 3), (Share, 11)],
    };
    let taken: usize = fixed.iter().map(|(_, width)| width + GAP).sum();
    let rest = width.saturating_sub(taken);
    let by = if width >= 90 { (rest - GAP) * 2 / 5 } else { 0 };
    let mut all = vec![(Name, rest.saturating_sub(if by > 0 { by + GAP } else { 0 }))];
    all.extend(fixed);
    all.extend((by > 0).then_some((By, by)));
    all
}

fn cell(row: &TopRow, column: Column, width: usize, model: &Model) -> String {
    match column {
        Column::Name => row.name.clone(),
        Column::Gpu => row.gpu(),
        Column::Share => share(&row.user),
        Column::Minute => model.spark(row, width),
        Column::Seconds => format!("{:.1}", row.user.gpu_seconds),
        Column::Memory => bytes(row.user.memory_used_bytes),
        Column::Waited => row.waiting.map_or(DASH.into(), |rate| format!("{rate:.2}")),
        Column::By => match &row.by[..] {
            [] => String::new(),
            [(name, _)] => name.clone(),
            [(name, _), more @ ..] => {
                let more = format!(" +{}", more.len());
                format!("{}{more}", fit(name, width.saturating_sub(more.len())))
            }
        },
    }
}

fn table(buf: &mut Buffer, area: Rect, model: &mut Model, paint: Paint) {
    if area.height == 0 {
        return;
    }
    let columns = columns(usize::from(area.width));
    model.fits(usize::from(area.height - 1));
    let head = columns.iter().map(|(column, width)| {
        let (name, sort) = column.head();
        let name = if name.len() > *width { name.rsplit(' ').next().unwrap_or(name) } else { name };
        let name = if sort == Some(model.sort) { format!("{name} ▼") } else { name.to_owned() };
        let text = if column.is_number() { right(&name, *width) } else { left(&name, *width) };
        let style = if sort == Some(model.sort) { paint.accent().add_modifier(Modifier::BOLD) } else { BOLD };
        [
            Span::styled(text, style.add_modifier(Modifier::UNDERLINED)),
            Span::styled("  ", Style::new().add_modifier(Modifier::UNDERLINED)),
        ]
    });
    buf.set_line(area.x, area.y, &Line::from(head.flatten().collect::<Vec<_>>()), area.width);
    if model.rows.is_empty() {
        return nothing(buf, Rect { y: area.y + 1, height: area.height - 1, ..area }, model);
    }
    let selected = model.selected();
    let rows = model.rows.iter().enumerate().skip(model.first).take(usize::from(area.height - 1));
    for (y, (index, row)) in (area.y + 1..).zip(rows) {
        let spans = columns.iter().map(|(column, width)| {
            let text = cell(row, *column, *width, model);
            let text = if column.is_number() { right(&text, *width) } else { left(&text, *width) };
            let waits = row.waiting.is_some_and(|rate| rate >= 0.005);
            let style = match column {
                _ if row.user.gone => paint.soft(),
                Column::Minute => paint.accent(),
                Column::Waited | Column::By if waits => paint.waits(),
                Column::Waited => paint.soft(),
                _ => Style::new(),
            };
            [Span::styled(text, style), Span::raw("  ")]
        });
        let line = Line::from(spans.flatten().collect::<Vec<_>>());
        buf.set_line(area.x, y, &line, area.width);
        if index == selected {
            buf.set_style(Rect { y, height: 1, ..area }, Style::new().add_modifier(Modifier::REVERSED));
        }
    }
}

fn nothing(buf: &mut Buffer, area: Rect, model: &Model) {
    let words = match (&model.live, &model.away) {
        (None, None) => "",
        (None, Some(_)) => "Nothing to show yet.",
        (Some(_), _) if model.total > 0 => "No row has these words; / changes the filter.",
        (Some(_), _) => {
            "No container has used a GPU since the agent started. One appears here when the driver first names one of its \
             processes, or when the kubelet assigns a GPU to it."
        }
    };
    Paragraph::new(words).wrap(Wrap { trim: true }).render(area, buf);
}

/// The row that is looked at, with what had no room in it.
fn details(model: &Model, width: usize, paint: Paint) -> Vec<Line<'static>> {
    let Some(row) = model.rows.get(model.selected()) else { return Vec::new() };
    let u = &row.user;
    let text = |name: &str, value: &Option<String>| value.as_deref().map(|value| format!("{name} {}", harmless(value)));
    let ended = u.gone.then(|| "ended".to_owned());
    let assigned = u.assigned.then(|| "assigned".to_owned());
    let id = Some(format!("id {}", short(&u.container_id))).filter(|_| !u.container_id.is_empty());
    let who = [Some(row.name.clone()), text("image", &u.image), id, ended, assigned];
    let who = who.into_iter().flatten().collect::<Vec<_>>().join("  ");
    let share = if u.active_seconds > 0.0 {
        format!(
            ", {} of its active {:.1} s beside others",
            percent(Some(u.coactive_seconds / u.active_seconds)),
            u.active_seconds
        )
    } else {
        String::new()
    };
    let on = format!(
        "on {}: {:.2} ±{:.2} GPU-seconds from {} samples{share}",
        harmless(&u.uuid),
        u.gpu_seconds,
        u.gpu_seconds_stderr,
        u.samples
    );
    let by: Vec<String> = u.contended_by.iter().map(|other| format!("{} {:.1} s", name_of_other(other), other.seconds)).collect();
    let waited =
        if by.is_empty() { "no contention so far".to_owned() } else { format!("contention so far with {}", by.join(", ")) };
    let lines = [(who, BOLD), (on, Style::new()), (waited, if by.is_empty() { paint.soft() } else { paint.waits() })];
    lines.into_iter().map(|(text, style)| Line::styled(fit(&text, width), style)).collect()
}

fn foot(model: &Model, width: usize, paint: Paint) -> Line<'static> {
    if model.typing.is_some() {
        return Line::styled(
            fit(&format!("filter: {}▏  Enter keeps it, Esc undoes it", harmless(&model.filter)), width),
            paint.accent(),
        );
    }
    let filter = if model.filter.is_empty() { String::new() } else { format!(" [{}]", harmless(&model.filter)) };
    let sort = match model.sort {
        Sort::Share => "share",
        Sort::Seconds => "GPU-seconds",
        Sort::Memory => "memory",
        Sort::Waiting => "waited",
        Sort::Name => "name",
    };
    let keys = format!("q quit  s sort [{sort}]  / filter{filter}  p {}  ? help", if model.paused { "go on" } else { "pause" });
    Line::styled(fit(&keys, width), paint.soft())
}

fn help(buf: &mut Buffer, area: Rect) {
    let width = area.width.saturating_sub(4).clamp(20, 76);
    let inside = usize::from(width.saturating_sub(4));
    let text: Vec<Line<'_>> = HELP
        .iter()
        .flat_map(|(key, what)| {
            let told = wrap(what, inside.saturating_sub(2), 4).into_iter().map(|line| Line::raw(format!("  {line}")));
            std::iter::once(Line::styled(*key, BOLD)).chain(told)
        })
        .collect();
    let height = (text.len() as u16 + 2).min(area.height);
    let at = Rect { x: area.x + (area.width - width) / 2, y: area.y + (area.height - height) / 2, width, height };
    Clear.render(at, buf);
    let block = Block::bordered()
        .title(" keys and columns ")
        .title_alignment(Alignment::Center)
        .padding(ratatui::widgets::Padding::horizontal(1));
    Paragraph::new(text).block(block).render(at, buf);
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
