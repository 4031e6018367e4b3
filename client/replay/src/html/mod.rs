//! Reports as one HTML file that needs nothing else: tables with the figures of the text, and charts as inline SVG. It loads
//! nothing, runs no script, and follows the reader's choice of light or dark.

mod chart;
mod pages;

use std::fmt::Write as _;

use comfy_table::Table;

pub use pages::{plan_page, replay_page};

const STYLE: &str = include_str!("style.css");

/// A page as it is put together.
struct Page {
    title: String,
    lead: String,
    body: String,
}

impl Page {
    fn new(title: &str, lead: &str) -> Self {
        Self {
            title: title.to_owned(),
            lead: lead.to_owned(),
            body: String::new(),
        }
    }

    fn heading(&mut self, text: &str) {
        let _ = writeln!(self.body, "<h2>{}</h2>", escaped(text));
    }

    fn paragraph(&mut self, text: &str) {
        let _ = writeln!(self.body, "<p>{}</p>", escaped(text));
    }

    /// A chart, with a sentence that says what it shows.
    fn figure(&mut self, chart: &str, caption: &str) {
        let _ = writeln!(
            self.body,
            "<figure>{chart}<figcaption>{}</figcaption></figure>",
            escaped(caption)
        );
    }

    /// The table of the text report.
    fn table(&mut self, table: &Table) {
        self.body.push_str("<div class=\"table\"><table>");
        if let Some(header) = table.header() {
            self.body.push_str("<thead><tr>");
            for cell in header.cell_iter() {
                let _ = write!(
                    self.body,
                    "<th scope=\"col\">{}</th>",
                    escaped(&cell.content())
                );
            }
            self.body.push_str("</tr></thead>");
        }
        self.body.push_str("<tbody>");
        for row in table.row_iter() {
            self.body.push_str("<tr>");
            for (index, cell) in row.cell_iter().enumerate() {
                let text = escaped(&cell.content());
                let _ = match index {
                    0 => write!(self.body, "<th scope=\"row\">{text}</th>"),
                    _ => write!(self.body, "<td>{text}</td>"),
                };
            }
            self.body.push_str("</tr>");
        }
        self.body.push_str("</tbody></table></div>\n");
    }

    fn finish(self) -> String {
        let (title, lead) = (escaped(&self.title), escaped(&self.lead));
        format!(
            "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\"/>\n\
             <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\"/>\n\
             <title>{title}</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n<main>\n\
             <h1>{title}</h1>\n<p class=\"lead\">{lead}</p>\n{}</main>\n</body>\n</html>\n",
            self.body
        )
    }
}

/// A text in which nothing is markup, and that turns no text around it.
fn escaped(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            '\n' | '\t' => escaped.push(' '),
            other if other.is_control() || swiftcache_proto::convert::reorders(other) => {
                let _ = write!(escaped, "\\u{{{:x}}}", u32::from(other));
            }
            other => escaped.push(other),
        }
    }
    escaped
}

#[cfg(test)]
mod tests;
