//! Draws the model. Parts that do not fit are omitted, the least important first; colours carry no information of their own.

use ratatui::Frame;
use ratatui::buffer::Buffer;
use ratatui::layout::{Alignment, Rect};
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::{Line, Span};
use ratatui::widgets::{Block, Clear, Paragraph, Widget as _, Wrap};
use unicode_width::UnicodeWidthStr as _;

use super::model::{LEAST_RATE, Model};
use super::names::{contender_name, share, short};
use super::rows::{Sort, TopRow};
use crate::cli::text::{DASH, bytes_or_dash, fit, left, percent_or_dash, right, terminal_safe, wrap};
use crate::export::live::{LiveGpu, LiveOther};

/// Least width and height; a smaller terminal has no room for a table.
const LEAST_SIZE: (u16, u16) = (24, 6);
/// Least height at which the details of the selected row are shown.
const DETAIL_HEIGHT: u16 = 18;
const GAP: usize = 2;
const HELP: [(&str, &str); 9] = [
    ("q, Esc", "quit"),
    ("s", "sort by the next column"),
    ("/", "filter: show only rows that contain all words; Enter applies it, Esc restores the previous one"),
    ("p, space", "pause the display; polling continues"),
    ("arrows, PgUp, PgDn, Home, End", "select another row"),
    ("SHARE %", "GPU share over the last 10 s, ± one standard error"),
    (
        "CONTENTION",
        "GPU-seconds per second, over the last minute, that others received while it was active and the GPU was saturated",
    ),
    ("PRESSURE", "recent time waited beyond that for its own work (with wait probes)"),
    ("shared", "part of the last 10 s in which at least two users were active"),
];

#[derive(Clone, Copy)]
struct Paint(bool);

impl Paint {
    fn colour(self, colour: Color) -> Style {
        if self.0 { Style::new().fg(colour) } else { Style::new() }
    }

    fn accent(self) -> Style {
        self.colour(Color::Cyan)
    }

    fn warning(self) -> Style {
        self.colour(Color::Yellow)
    }

    fn error(self) -> Style {
        self.colour(Color::Red).add_modifier(Modifier::BOLD)
    }

    fn dim(self) -> Style {
        Style::new().add_modifier(Modifier::DIM)
    }
}

const BOLD: Style = Style::new().add_modifier(Modifier::BOLD);

pub fn draw(frame: &mut Frame<'_>, model: &mut Model, colours: bool) {
    let (area, paint) = (frame.area(), Paint(colours));
    let buf = frame.buffer_mut();
    if area.width < LEAST_SIZE.0 || area.height < LEAST_SIZE.1 {
        Paragraph::new("terminal too small; q quits").render(area, buf);
        return;
    }
    let mut top = lines(buf, area, 0, head(model, area, paint));
    let detail = if area.height >= DETAIL_HEIGHT && !model.rows.is_empty() { 3 } else { 0 };
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

/// Title, problems, and a line for each GPU, in at most a third of the screen.
fn head(model: &Model, area: Rect, paint: Paint) -> Vec<Line<'static>> {
    let width = usize::from(area.width);
    let mut all = vec![title(model, width, paint)];
    let most = usize::from(area.height / 3).max(2);
    if let Some(error) = &model.disconnected {
        let text = format!("DISCONNECTED: {}; retrying", terminal_safe(error));
        all.extend(wrap_fit(&text, width, 4).map(|line| Line::styled(line, paint.error())));
    }
    let Some(live) = &model.live else { return all };
    let conditions = live.degraded.len();
    for condition in live.degraded.iter().take(2) {
        let text = format!("degraded: {}: {}", terminal_safe(&condition.what), terminal_safe(&condition.message));
        all.extend(wrap_fit(&text, width, 2).map(|line| Line::styled(line, paint.warning())));
    }
    if conditions > 2 {
        let text = format!("and {} more conditions: see the agent's page or log", conditions - 2);
        all.push(Line::styled(text, paint.warning()));
    }
    let gpus: Vec<&LiveGpu> = live.gpus.iter().filter(|gpu| !gpu.gone).collect();
    let room = most.saturating_sub(all.len()).max(1);
    let shown = if gpus.len() > room { room.saturating_sub(1).max(1) } else { gpus.len() };
    for gpu in &gpus[..shown] {
        all.push(gauge(gpu, model, width, paint));
    }
    if gpus.len() > shown {
        all.push(Line::styled(format!("and {} more GPUs", gpus.len() - shown), paint.dim()));
    }
    if gpus.is_empty() {
        let text = match conditions {
            0 => "No GPU is visible; run `gpu-sampler doctor` for the reason.",
            _ => "No GPU is visible.",
        };
        all.push(Line::raw(text));
    }
    all
}

/// Wrapped; text beyond `most` lines is truncated.
fn wrap_fit(text: &str, width: usize, most: usize) -> impl Iterator<Item = String> {
    wrap(text, width, most).into_iter().map(move |line| fit(&line, width))
}

fn title(model: &Model, width: usize, paint: Paint) -> Line<'static> {
    let mut spans = vec![Span::styled("gpu-sampler top", BOLD)];
    let mut add = |text: String, style: Style| {
        let taken: usize = spans.iter().map(|span| span.content.width()).sum();
        if taken + 2 + text.width() <= width {
            spans.push(Span::styled(format!("  {text}"), style));
        }
    };
    if model.paused {
        add("PAUSED".into(), paint.warning().add_modifier(Modifier::BOLD));
    }
    if let Some(live) = &model.live {
        add(terminal_safe(live.node.as_deref().unwrap_or(&model.agent)), Style::new());
        // The time of day of an RFC 3339 time.
        add(live.time.get(11..19).map(|time| format!("{time} UTC")).unwrap_or_default(), Style::new());
        let rows = if model.rows.len() < model.total {
            format!("{} of {} rows", model.rows.len(), model.total)
        } else {
            format!("{} rows", model.total)
        };
        add(rows, Style::new());
        add(format!("agent {}", terminal_safe(&live.version)), paint.dim());
        add(format!("every {}", humantime::format_duration(model.interval)), paint.dim());
    } else if model.disconnected.is_none() {
        add(format!("connecting to {}", terminal_safe(&model.agent)), paint.dim());
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
        spans.extend([Span::styled(full, paint.accent()), Span::styled(rest, paint.dim())]);
        let busy = right(&percent_or_dash(gpu.utilization_ratio), 6);
        taken += busy.width();
        spans.push(Span::styled(busy, BOLD));
    }
    let memory = format!("{} / {}", bytes_or_dash(gpu.memory_used_bytes), bytes_or_dash(gpu.memory_total_bytes));
    // Busy time in no row: of host processes, of unknown processes, or of users with pending labels.
    let credited = model.live.iter().flat_map(|live| &live.users).filter(|user| user.uuid == gpu.uuid);
    let credited: f64 = credited.filter_map(|user| user.duty_cycle_percent).sum();
    let unattributed = gpu.utilization_ratio.map(|ratio| (ratio - credited / 100.0).max(0.0)).filter(|ratio| *ratio >= 0.01);
    let model_name = terminal_safe(&gpu.model);
    let all = [
        gpu.is_leaf.then_some((memory, Style::new())),
        Some((gpu.power_watts.map_or(DASH.into(), |watts| format!("{watts:.0} W")), Style::new())),
        Some((gpu.temperature_celsius.map_or(DASH.into(), |celsius| format!("{celsius:.0} °C")), Style::new())),
        gpu.coactive_ratio.map(|ratio| (format!("shared {}", percent_or_dash(Some(ratio))), Style::new())),
        unattributed.map(|ratio| (format!("unattributed {}", percent_or_dash(Some(ratio))), paint.warning())),
        Some((model_name, paint.dim())),
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
    Pressure,
    Contention,
    With,
}

impl Column {
    fn head(self) -> (&'static str, Option<Sort>) {
        match self {
            Column::Name => ("USER", Some(Sort::Name)),
            Column::Gpu => ("GPU", None),
            Column::Share => ("SHARE %", Some(Sort::Share)),
            Column::Minute => ("LAST MINUTE", None),
            Column::Seconds => ("GPU-SECONDS", Some(Sort::Seconds)),
            Column::Memory => ("MEMORY", Some(Sort::Memory)),
            Column::Pressure => ("PRESSURE", Some(Sort::Pressure)),
            Column::Contention => ("CONTENTION", Some(Sort::Waiting)),
            Column::With => ("WITH", None),
        }
    }

    fn is_number(self) -> bool {
        matches!(self, Column::Share | Column::Seconds | Column::Memory | Column::Pressure | Column::Contention)
    }
}

/// The columns that fit into `width`, with their widths. That of pressure exists only where wait probes are on.
fn columns(width: usize, has_waits: bool) -> Vec<(Column, usize)> {
    use Column::{Contention, Gpu, Memory, Minute, Name, Pressure, Seconds, Share, With};
    let fixed: &[(Column, usize)] = match width {
        120.. => &[(Gpu, 3), (Share, 11), (Minute, 15), (Seconds, 13), (Memory, 9), (Pressure, 8), (Contention, 10)],
        90.. => &[(Gpu, 3), (Share, 11), (Minute, 12), (Seconds, 13), (Pressure, 8), (Contention, 10)],
        70.. => &[(Gpu, 3), (Share, 11), (Minute, 12), (Pressure, 8), (Contention, 10)],
        56.. => &[(Gpu, 3), (Share, 11), (Minute, 6), (Contention, 10)],
        _ => &[(Gpu, 3), (Share, 11)],
    };
    let fixed: Vec<(Column, usize)> = fixed.iter().copied().filter(|(column, _)| has_waits || *column != Pressure).collect();
    let taken: usize = fixed.iter().map(|(_, width)| width + GAP).sum();
    let rest = width.saturating_sub(taken);
    let with_width = if width >= 90 { (rest - GAP) * 2 / 5 } else { 0 };
    let mut all = vec![(Name, rest.saturating_sub(if with_width > 0 { with_width + GAP } else { 0 }))];
    all.extend(fixed);
    all.extend((with_width > 0).then_some((With, with_width)));
    all
}

fn cell(row: &TopRow, column: Column, width: usize, model: &Model) -> String {
    match column {
        Column::Name => row.name.clone(),
        Column::Gpu => row.gpu(),
        Column::Share => share(&row.user),
        Column::Minute => model.spark(row, width),
        Column::Seconds => format!("{:.1}", row.user.gpu_seconds),
        Column::Memory => bytes_or_dash(row.user.memory_used_bytes),
        Column::Pressure => row.pressure(),
        Column::Contention => row.contention.map_or(DASH.into(), |rate| format!("{rate:.2}")),
        Column::With => match &row.contenders[..] {
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
    let columns = columns(usize::from(area.width), model.rows.iter().any(|row| row.user.waits.is_some()));
    model.set_page(usize::from(area.height - 1));
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
        return empty_table(buf, Rect { y: area.y + 1, height: area.height - 1, ..area }, model);
    }
    let selected = model.selected();
    let rows = model.rows.iter().enumerate().skip(model.first).take(usize::from(area.height - 1));
    for (y, (index, row)) in (area.y + 1..).zip(rows) {
        let spans = columns.iter().map(|(column, width)| {
            let text = cell(row, *column, *width, model);
            let text = if column.is_number() { right(&text, *width) } else { left(&text, *width) };
            let is_contended = row.contention.is_some_and(|rate| rate >= LEAST_RATE);
            let style = match column {
                _ if row.user.gone => paint.dim(),
                Column::Minute => paint.accent(),
                Column::Contention | Column::With if is_contended => paint.warning(),
                Column::Contention => paint.dim(),
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

fn empty_table(buf: &mut Buffer, area: Rect, model: &Model) {
    let text = match (&model.live, &model.disconnected) {
        (None, None) => "",
        (None, Some(_)) => "No data yet.",
        (Some(_), _) if model.total > 0 => "No row matches the filter; press / to change it.",
        (Some(_), _) => {
            "No container, job or unit has used a GPU since the agent started. One appears here when the driver first reports one of its \
             processes, or when the kubelet assigns a GPU to it."
        }
    };
    Paragraph::new(text).wrap(Wrap { trim: true }).render(area, buf);
}

/// The selected row, with the values that have no column.
fn details(model: &Model, width: usize, paint: Paint) -> Vec<Line<'static>> {
    let Some(row) = model.rows.get(model.selected()) else { return Vec::new() };
    let u = &row.user;
    let text = |name: &str, value: &Option<String>| value.as_deref().map(|value| format!("{name} {}", terminal_safe(value)));
    let ended = u.gone.then(|| "ended".to_owned());
    let assigned = u.assigned.then(|| "assigned".to_owned());
    let is_container = u.is_container();
    let kind = Some(u.kind.clone()).filter(|_| !is_container);
    let id = Some(format!("id {}", short(&u.container_id))).filter(|_| is_container && !u.container_id.is_empty());
    let job = [text("name", &u.job_name), text("owner", &u.owner), text("partition", &u.partition)];
    let identity = [Some(row.name.clone()), kind, text("image", &u.image), id].into_iter().chain(job).chain([ended, assigned]);
    let identity = identity.flatten().collect::<Vec<_>>().join("  ");
    let coactive = if u.active_seconds > 0.0 {
        format!(
            ", active {:.1} s, {} of it with others",
            u.active_seconds,
            percent_or_dash(Some(u.coactive_seconds / u.active_seconds))
        )
    } else {
        String::new()
    };
    let waited = u.waits.filter(|waits| waits.probed_seconds > 0.0).map(|waits| waits.wait_seconds / waits.probed_seconds);
    let waits = waited.map(|ratio| format!(", waits {}", percent_or_dash(Some(ratio))));
    let usage = format!(
        "on {}: {:.2} ±{:.2} GPU-seconds from {} samples{coactive}{}",
        terminal_safe(&u.uuid),
        u.gpu_seconds,
        u.gpu_seconds_stderr,
        u.samples,
        waits.unwrap_or_default()
    );
    let contender = |other: &LiveOther| {
        let pressure = other.pressure_ratio.filter(|ratio| *ratio > 0.0);
        let pressure = pressure.map(|ratio| format!(" (pressure now {})", percent_or_dash(Some(ratio))));
        format!("{} {:.1} s{}", contender_name(other), other.seconds, pressure.unwrap_or_default())
    };
    let contenders: Vec<String> = u.contended_by.iter().map(contender).collect();
    let contention = match contenders.is_empty() {
        true => ("no contention so far".to_owned(), paint.dim()),
        false => (format!("contention so far with {}", contenders.join(", ")), paint.warning()),
    };
    let lines = [(identity, BOLD), (usage, Style::new()), contention];
    lines.into_iter().map(|(text, style)| Line::styled(fit(&text, width), style)).collect()
}

fn foot(model: &Model, width: usize, paint: Paint) -> Line<'static> {
    if model.typing.is_some() {
        return Line::styled(
            fit(&format!("filter: {}▏  Enter applies it, Esc restores the previous one", terminal_safe(&model.filter)), width),
            paint.accent(),
        );
    }
    let filter = if model.filter.is_empty() { String::new() } else { format!(" [{}]", terminal_safe(&model.filter)) };
    let sort = match model.sort {
        Sort::Share => "share",
        Sort::Seconds => "GPU-seconds",
        Sort::Memory => "memory",
        Sort::Pressure => "pressure",
        Sort::Waiting => "contention",
        Sort::Name => "name",
    };
    let keys = format!("q quit  s sort [{sort}]  / filter{filter}  p {}  ? help", if model.paused { "resume" } else { "pause" });
    Line::styled(fit(&keys, width), paint.dim())
}

fn help(buf: &mut Buffer, area: Rect) {
    let width = area.width.saturating_sub(4).clamp(20, 76);
    let inside = usize::from(width.saturating_sub(4));
    let text: Vec<Line<'_>> = HELP
        .iter()
        .flat_map(|(key, meaning)| {
            let meaning = wrap_fit(meaning, inside.saturating_sub(2), 4).map(|line| Line::raw(format!("  {line}")));
            std::iter::once(Line::styled(*key, BOLD)).chain(meaning)
        })
        .collect();
    let height = (text.len() as u16 + 2).min(area.height);
    let window = Rect { x: area.x + (area.width - width) / 2, y: area.y + (area.height - height) / 2, width, height };
    Clear.render(window, buf);
    let block = Block::bordered()
        .title(" keys and columns ")
        .title_alignment(Alignment::Center)
        .padding(ratatui::widgets::Padding::horizontal(1));
    Paragraph::new(text).block(block).render(window, buf);
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
