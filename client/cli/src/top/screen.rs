//! The screen: its contents and their layout.

use ratatui::{
    Frame,
    layout::{Constraint, Layout, Rect},
    style::{Color, Modifier, Style},
    text::{Line, Span},
    widgets::{Paragraph, Row, Table},
};
use swiftcache_proto::v1;

use super::{
    super::{
        admin::{Snapshot, is_host_memory, simulated},
        output::deceives,
    },
    bars::{self, PARTS},
    rows::{self, Found, Rates},
};
use swiftcache_replay::report::bytes;

/// The lines for leases and events, with their titles, that remain for any number of devices.
const LEAST_BELOW: u16 = 10;
/// The lines for disks.
const MOST_DISKS: usize = 3;
/// The columns for a device's number and UUID.
const NAME_WIDTH: usize = 18;
/// The columns for a device's figures.
const FIGURES_WIDTH: usize = 25;

/// The contents of the screen.
#[derive(Default)]
pub(super) struct Screen {
    snapshot: Option<Snapshot>,
    events: Vec<v1::EventRecord>,
    rates: Option<Rates>,
    /// Why the contents are out of date, if they are.
    pub(super) problem: Option<String>,
}

impl Screen {
    pub(super) fn update(&mut self, snapshot: Snapshot, events: Vec<v1::EventRecord>) {
        if let Some(before) = &self.snapshot {
            self.rates = Rates::between(&before.node, &snapshot.node);
        }
        self.snapshot = Some(snapshot);
        self.events = events;
        self.problem = None;
    }

    pub(super) fn render(&self, frame: &mut Frame<'_>) {
        let area = frame.area();
        let Some(snapshot) = &self.snapshot else {
            let waiting = self.problem.as_deref().unwrap_or("asking the broker ...");
            frame.render_widget(Paragraph::new(waiting), area);
            return;
        };
        let links = self.links();
        let devices = u16::try_from(snapshot.node.devices.len()).unwrap_or(u16::MAX);
        let room = area.height.saturating_sub(2 + LEAST_BELOW).max(2);
        let disks = disks_of(&snapshot.node);
        let heights = [
            Constraint::Length(1),
            Constraint::Length(devices.saturating_add(1).min(room)),
            Constraint::Length(disks.len() as u16),
            Constraint::Length(1 + u16::from(links.is_some())),
            Constraint::Fill(3),
            Constraint::Fill(2),
        ];
        let [top, devices, below, traffic, leases, events] = Layout::vertical(heights).areas(area);
        frame.render_widget(self.headline(&snapshot.node), top);
        frame.render_widget(devices_of(&snapshot.node, devices), devices);
        frame.render_widget(Paragraph::new(disks), below);
        let lines: Vec<_> = std::iter::once(self.lookups(&snapshot.node))
            .chain(links)
            .collect();
        frame.render_widget(Paragraph::new(lines), traffic);
        render_leases(snapshot, frame, leases);
        self.render_events(frame, events);
        hide_deceivers(frame);
    }

    fn headline(&self, node: &v1::GetNodeResponse) -> Line<'static> {
        if let Some(problem) = &self.problem {
            return Line::styled(problem.clone(), Style::new().fg(Color::Red));
        }
        let uptime = std::time::Duration::from_secs(node.uptime_ms / 1_000);
        // A narrow terminal cuts off the end of the line. The topology may be cut off; SIMULATED may not.
        let (first, last) = match simulated(node) {
            Some(topology) => ("SIMULATED  ", topology),
            None => ("", node.probe.as_str()),
        };
        let left_out = match node.left_out.len() {
            0 => String::new(),
            1 => "1 GPU left out  ".to_owned(),
            gpus => format!("{gpus} GPUs left out  "),
        };
        let text = format!(
            "{first}swiftcache {}  up {}  {left_out}{} sessions  {} blocks  q quits  {last}",
            node.version,
            humantime::format_duration(uptime),
            node.sessions,
            node.indexed_blocks,
        );
        Line::styled(text, Style::new().add_modifier(Modifier::BOLD))
    }

    /// The line with bytes by link, once there are any. The engines report them, because the broker sees no copies.
    fn links(&self) -> Option<Line<'static>> {
        let rates = self
            .rates
            .as_ref()
            .filter(|rates| !rates.links.is_empty())?;
        let links = rates.links.iter().map(|rate| {
            let (loaded, stored) = (bytes(rate.loaded as u64), bytes(rate.stored as u64));
            // The text is so short that three kinds of links fit in 80 columns.
            format!("  {} {loaded}/{stored}", rate.link)
        });
        Some(Line::raw(format!(
            "in/out per s{}",
            links.collect::<String>()
        )))
    }

    /// The line with what engines found of what they asked for, as they report it.
    fn lookups(&self, node: &v1::GetNodeResponse) -> Line<'static> {
        let found = Found::of(node.traffic.as_ref());
        let (ever, tiers) = (found.share(), found.by_tier());
        Line::raw(match &self.rates {
            // The text is so short that it fits in 80 columns.
            Some(rates) => format!(
                "hits {} now {ever} ever  {tiers}  {:.0} found/s {:.0} published/s",
                rates.hit_rate(),
                rates.hits,
                rates.published
            ),
            None => format!("hits {ever} ever  {tiers}"),
        })
    }

    fn render_events(&self, frame: &mut Frame<'_>, area: Rect) {
        let room = usize::from(area.height.saturating_sub(1));
        let newest = self.events.iter().rev().take(room);
        let lines = newest.map(|event| {
            let colour = match event.kind.as_str() {
                "zombie" | "gone" => Color::Red,
                "short" | "revoke" | "drain" => Color::Yellow,
                _ => Color::Reset,
            };
            let line = format!(
                "{} {:11} {}",
                rows::clock(event.unix_ms),
                event.kind,
                event.text
            );
            Line::styled(line, Style::new().fg(colour))
        });
        let lines: Vec<_> = std::iter::once(title("events (newest first, UTC)"))
            .chain(lines)
            .collect();
        frame.render_widget(Paragraph::new(lines), area);
    }
}

fn title(text: &'static str) -> Line<'static> {
    Line::styled(text, Style::new().add_modifier(Modifier::REVERSED))
}

fn devices_of(node: &v1::GetNodeResponse, area: Rect) -> Paragraph<'static> {
    let mut lines = vec![legend()];
    let room = usize::from(area.height.saturating_sub(1));
    let all = node.devices.len();
    // When the devices do not all fit, the last line says how many are missing.
    let shown = if all > room {
        room.saturating_sub(1)
    } else {
        all
    };
    let width = usize::from(area.width).saturating_sub(NAME_WIDTH + FIGURES_WIDTH + 3);
    let devices = node.devices.iter().take(shown);
    lines.extend(devices.map(|device| bar(device, width)));
    if shown < all {
        lines.push(Line::raw(format!("and {} more devices", all - shown)));
    }
    Paragraph::new(lines)
}

/// A line for each disk. When they are too many, the last line says how many are missing.
fn disks_of(node: &v1::GetNodeResponse) -> Vec<Line<'static>> {
    let all = &node.disks;
    let shown = if all.len() > MOST_DISKS {
        MOST_DISKS - 1
    } else {
        all.len()
    };
    let mut lines: Vec<_> = all.iter().take(shown).map(disk).collect();
    if shown < all.len() {
        lines.push(Line::raw(format!("and {} more disks", all.len() - shown)));
    }
    lines
}

fn disk(status: &v1::DiskStatus) -> Line<'static> {
    let state = status.state.clone().unwrap_or_default();
    // What is wrong matters more than where the file is. A narrow terminal cuts off the end of the line.
    let (last, style) = match state.problem.as_str() {
        "" => (state.path, Style::new()),
        problem => (problem.to_owned(), Style::new().fg(Color::Red)),
    };
    let text = format!(
        "{} {} of {}  {} blocks, {} written {} read {} lost  {last}",
        status.device_uuid,
        bytes(state.used_bytes),
        bytes(state.bytes),
        status.blocks,
        state.written_blocks,
        state.read_blocks,
        state.corrupt_blocks + state.failed_blocks,
    );
    Line::styled(text, style)
}

/// Takes out what would turn the text around it or command the terminal. A cell may hold such a character beside the one
/// that it shows.
fn hide_deceivers(frame: &mut Frame<'_>) {
    for cell in &mut frame.buffer_mut().content {
        if cell.symbol().chars().any(deceives) {
            let shown: String = cell
                .symbol()
                .chars()
                .filter(|shown| !deceives(*shown))
                .collect();
            cell.set_symbol(if shown.is_empty() { " " } else { &shown });
        }
    }
}

fn legend() -> Line<'static> {
    let mut spans = vec![Span::styled(
        "devices",
        Style::new().add_modifier(Modifier::REVERSED),
    )];
    for part in PARTS {
        spans.push(Span::raw(" "));
        spans.push(part.span(1));
        spans.push(Span::raw(format!(" {}", part.name)));
    }
    Line::from(spans)
}

fn bar(status: &v1::DeviceStatus, width: usize) -> Line<'static> {
    let device = status.device.clone().unwrap_or_default();
    let account = status.account.unwrap_or_default();
    let mut name = match is_host_memory(&device.uuid) {
        true => device.uuid.clone(),
        false => format!("{} {}", device.ordinal, device.uuid),
    };
    if name.chars().count() > NAME_WIDTH {
        name = name.chars().take(NAME_WIDTH - 1).chain(['…']).collect();
    }
    let parts = bars::bytes(status);
    let cells = bars::cells(parts, device.hbm_bytes, width);
    let mut spans = vec![Span::raw(format!("{name:NAME_WIDTH$}["))];
    spans.extend(
        PARTS
            .iter()
            .zip(cells)
            .map(|(part, cells)| part.span(cells)),
    );
    let rest = width - cells.iter().sum::<usize>();
    let lent = account.offered_bytes - account.free_bytes.min(account.offered_bytes);
    let figures = format!("{} of {}", bytes(lent), bytes(account.offered_bytes));
    let drained = match status.drained || account.drained_bytes > 0 {
        true => " drain",
        false => "",
    };
    // Without the HBM use, nobody knows whether the rest is free or in use by others.
    let unused = if status.hbm_used_unknown { "?" } else { " " };
    spans.push(Span::raw(format!(
        "{}] {figures}{drained}",
        unused.repeat(rest)
    )));
    Line::from(spans)
}

fn render_leases(snapshot: &Snapshot, frame: &mut Frame<'_>, area: Rect) {
    let leases = rows::leases(&snapshot.leases, &snapshot.node.devices);
    let table_rows = leases.iter().map(|lease| {
        let style = if lease.is_zombie() {
            Style::new().fg(Color::Red)
        } else {
            Style::new()
        };
        let cells = [
            lease.borrower.clone(),
            lease.namespace.clone(),
            lease.device.clone(),
            lease.link.to_owned(),
            bytes(lease.bytes),
            lease.blocks.to_string(),
            rows::hits_of(lease, &snapshot.sessions, &snapshot.namespaces),
            lease.state(),
        ];
        Row::new(cells).style(style)
    });
    let widths = [
        Constraint::Fill(3),
        Constraint::Fill(3),
        Constraint::Length(3),
        Constraint::Length(6),
        Constraint::Length(8),
        Constraint::Length(7),
        Constraint::Length(4),
        Constraint::Fill(3),
    ];
    let header = [
        "lease holder",
        "namespace",
        "on",
        "link",
        "bytes",
        "blocks",
        "hits",
        "state",
    ];
    let header = Row::new(header).style(Style::new().add_modifier(Modifier::REVERSED));
    frame.render_widget(Table::new(table_rows, widths).header(header), area);
}

#[cfg(test)]
mod tests;
