//! Charts as SVG: curves and stacked bars.

use std::fmt::Write as _;

use super::escaped;

const WIDTH: f64 = 760.0;
const HEIGHT: f64 = 300.0;
const LEFT: f64 = 64.0;
const RIGHT: f64 = 12.0;
const TOP: f64 = 12.0;
const BOTTOM: f64 = 44.0;
/// Colours that differ.
const COLOURS: usize = 8;
/// Lines across a chart, about.
const TICKS: f64 = 5.0;

/// One axis.
#[derive(Clone, Copy)]
pub(super) struct Axis<'a> {
    /// What it is, with its unit.
    pub(super) name: &'a str,
    /// Powers of ten at equal distances.
    pub(super) log: bool,
}

/// A curve's name and its points.
pub(super) type Curve = (String, Vec<(f64, f64)>);

/// From values to places.
struct Scale {
    low: f64,
    high: f64,
    log: bool,
}

impl Scale {
    fn of(values: impl Iterator<Item = f64> + Clone, log: bool) -> Self {
        let usable = values.filter(|value| value.is_finite() && (!log || *value > 0.0));
        let high = usable.clone().fold(f64::MIN_POSITIVE, f64::max);
        match log {
            true => {
                let low = usable.fold(high, f64::min);
                let (low, high) = (low.log10().floor(), high.log10().ceil());
                let high = if high > low { high } else { low + 1.0 };
                Self { low, high, log }
            }
            false => {
                let step = step(high);
                let high = (high / step).ceil().max(1.0) * step;
                Self {
                    low: 0.0,
                    high,
                    log,
                }
            }
        }
    }

    /// A value's share of the way from the lowest to the highest.
    fn share(&self, value: f64) -> f64 {
        let value = match self.log {
            true => value.max(f64::MIN_POSITIVE).log10(),
            false => value,
        };
        ((value - self.low) / (self.high - self.low)).clamp(0.0, 1.0)
    }

    fn ticks(&self) -> Vec<f64> {
        let mut ticks = Vec::new();
        let step = if self.log { 1.0 } else { step(self.high) };
        let mut at = self.low;
        while at <= self.high + step / 1e3 && ticks.len() < 40 {
            ticks.push(if self.log { 10_f64.powf(at) } else { at });
            at += step;
        }
        ticks
    }
}

/// A round step that gives about so many ticks.
fn step(high: f64) -> f64 {
    let rough = (high / TICKS).max(f64::MIN_POSITIVE);
    let power = 10_f64.powf(rough.log10().floor());
    let steps = [1.0, 2.0, 5.0, 10.0];
    let round = steps.iter().find(|step| **step * power >= rough * 0.999);
    round.copied().unwrap_or(10.0) * power
}

fn number(value: f64) -> String {
    let text = match value.abs() {
        size if size >= 1e4 || size == 0.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.0}"),
        size if size >= 1.0 => format!("{value:.1}"),
        _ => format!("{value:.3}"),
    };
    match text.contains('.') {
        true => text.trim_end_matches('0').trim_end_matches('.').to_owned(),
        false => text,
    }
}

fn x(share: f64) -> f64 {
    LEFT + share * (WIDTH - LEFT - RIGHT)
}

fn y(share: f64) -> f64 {
    HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)
}

fn open(what: &str) -> String {
    format!(
        "<svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" aria-label=\"{}\">",
        escaped(what)
    )
}

fn grid(svg: &mut String, scale: &Scale, axis: Axis<'_>) {
    for tick in scale.ticks() {
        let at = y(scale.share(tick));
        let end = WIDTH - RIGHT;
        let _ = write!(
            svg,
            "<line class=\"grid\" x1=\"{LEFT}\" y1=\"{at:.1}\" x2=\"{end}\" y2=\"{at:.1}\"/>\
             <text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
            LEFT - 8.0,
            at + 4.0,
            number(tick)
        );
    }
    let middle = (TOP + HEIGHT - BOTTOM) / 2.0;
    let _ = write!(
        svg,
        "<text x=\"14\" y=\"{middle:.1}\" text-anchor=\"middle\" transform=\"rotate(-90 14 {middle:.1})\">{}</text>",
        escaped(axis.name)
    );
}

fn below(svg: &mut String, at: f64, text: &str) {
    let _ = write!(
        svg,
        "<text x=\"{at:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>",
        HEIGHT - BOTTOM + 18.0,
        escaped(text)
    );
}

fn name_below(svg: &mut String, name: &str) {
    let _ = write!(
        svg,
        "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>",
        x(0.5),
        HEIGHT - 6.0,
        escaped(name)
    );
}

fn legend(names: impl Iterator<Item = String>) -> String {
    let mut list = "<ul class=\"legend\">".to_owned();
    for (index, name) in names.enumerate() {
        let colour = index % COLOURS;
        let _ = write!(
            list,
            "<li><span class=\"b{colour}\"></span>{}</li>",
            escaped(&name)
        );
    }
    list + "</ul>"
}

/// Curves over a common axis.
pub(super) fn curves(across: Axis<'_>, up: Axis<'_>, curves: &[Curve], steps: bool) -> String {
    let points = || curves.iter().flat_map(|(_, points)| points.iter());
    let wide = Scale::of(points().map(|point| point.0), across.log);
    let high = Scale::of(points().map(|point| point.1), up.log);
    let mut svg = open(&format!("{} against {}", up.name, across.name));
    grid(&mut svg, &high, up);
    for tick in wide.ticks() {
        below(&mut svg, x(wide.share(tick)), &number(tick));
    }
    name_below(&mut svg, across.name);
    for (index, (name, points)) in curves.iter().enumerate() {
        let mut path = String::new();
        for (at, point) in points.iter().enumerate() {
            let (across, up) = (x(wide.share(point.0)), y(high.share(point.1)));
            let _ = match (at, steps) {
                (0, _) => write!(path, "M{across:.1} {up:.1}"),
                (_, true) => write!(path, "H{across:.1}V{up:.1}"),
                (_, false) => write!(path, "L{across:.1} {up:.1}"),
            };
        }
        let colour = index % COLOURS;
        let _ = write!(
            svg,
            "<path class=\"curve k{colour}\" d=\"{path}\"><title>{}</title></path>",
            escaped(name)
        );
    }
    svg.push_str("</svg>");
    legend(curves.iter().map(|(name, _)| name.clone())) + &svg
}

/// One bar and what it is made of, from below.
pub(super) struct Bar {
    pub(super) name: String,
    pub(super) parts: Vec<f64>,
}

/// Bars beside each other, each made of parts.
pub(super) fn bars(up: Axis<'_>, parts: &[&str], bars: &[Bar]) -> String {
    let sums = bars.iter().map(|bar| bar.parts.iter().sum::<f64>());
    let high = Scale::of(sums, up.log);
    let mut svg = open(up.name);
    grid(&mut svg, &high, up);
    let slot = 1.0 / bars.len().max(1) as f64;
    let wide = (x(slot) - x(0.0)) * 0.7;
    for (index, bar) in bars.iter().enumerate() {
        let middle = x((index as f64 + 0.5) * slot);
        let mut sum = 0.0;
        for (part, value) in bar.parts.iter().enumerate() {
            let (from, to) = (y(high.share(sum)), y(high.share(sum + value)));
            sum += value;
            let (left, tall) = (middle - wide / 2.0, (from - to).max(0.0));
            let colour = part % COLOURS;
            let name = parts.get(part).copied().unwrap_or_default();
            let _ = write!(
                svg,
                "<rect class=\"f{colour}\" x=\"{left:.1}\" y=\"{to:.1}\" width=\"{wide:.1}\" height=\"{tall:.1}\">\
                 <title>{}: {} {}</title></rect>",
                escaped(&bar.name),
                escaped(name),
                number(*value)
            );
        }
        below(&mut svg, middle, &bar.name);
    }
    svg.push_str("</svg>");
    let names = parts.iter().map(|part| (*part).to_owned());
    legend(names) + &svg
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_and_hold_the_values_between_them() {
        for high in [0.003, 0.7, 1.0, 9.0, 83.0, 1e6] {
            let scale = Scale::of([0.0, high].into_iter(), false);
            let ticks = scale.ticks();
            assert!((3..=8).contains(&ticks.len()), "{high}: {ticks:?}");
            assert!(ticks[ticks.len() - 1] >= high * 0.999, "{high}: {ticks:?}");
        }
        let scale = Scale::of([20.0, 3000.0].into_iter(), true);
        assert_eq!(scale.ticks(), [10.0, 100.0, 1000.0, 10_000.0]);
        assert!((scale.share(100.0) - 1.0 / 3.0).abs() < 1e-9);
    }

    #[test]
    fn what_is_no_number_draws_no_nonsense() {
        let axis = Axis {
            name: "a",
            log: true,
        };
        for values in [vec![], vec![0.0], vec![f64::NAN, f64::INFINITY], vec![5.0]] {
            let points = values.iter().map(|value| (*value, *value)).collect();
            let drawn = curves(axis, axis, &[("x".to_owned(), points)], false);
            assert!(!drawn.contains("NaN") && !drawn.contains("inf"), "{drawn}");
        }
    }
}
