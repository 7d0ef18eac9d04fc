//! The page: one file that needs no other.

use std::fmt::Write as _;

use super::figure::Figure;
use super::svg::{STYLE, escaped};
use super::tables::{Entry, Table, Tables};
use crate::results::{Kind, Results};

const PAGE_STYLE: &str = "\
:root{color-scheme:light dark}
body{margin:0 auto;padding:16px;max-width:1200px;font:15px/1.5 system-ui,-apple-system,'Segoe UI','DejaVu Sans',sans-serif;\
background:#fff;color:#24292f}
h1{font-size:24px;line-height:1.25;margin:8px 0}h2{font-size:18px;margin:40px 0 4px}
p{margin:4px 0 12px;max-width:75ch}ul{padding-left:20px}
.q,small{color:#59636e}small{font-size:12px}
.wide{overflow-x:auto}
table{border-collapse:collapse;font-size:13px;font-variant-numeric:tabular-nums}
th,td{text-align:left;vertical-align:top;padding:4px 14px 4px 0;border-bottom:1px solid #e3e7eb}
th{font-size:12px;color:#59636e}
table.f td+td,table.f th+th{text-align:right;white-space:nowrap}
table.f td+td small{display:block}
table.f td:first-child,table.f th:first-child{position:sticky;left:0;white-space:nowrap;background:#fff}
td small{display:block}.ways td:first-child{white-space:nowrap}
.yes{color:#116329}.no{color:#a40e26}.yes,.no{font-weight:bold;white-space:nowrap}
.panels{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,340px),1fr));gap:20px 32px}
.panels svg{width:100%;max-width:440px;height:auto}
.key{display:inline-block;width:.8em;height:.8em;margin-right:.45em}.key.ours{background:#0a5fd1}\
.key.floor{background:#7d8590}.key.peer{background:#c9a66b}
@media(max-width:600px){
.goals thead{display:none}.goals tr{display:block;padding:8px 0;border-bottom:1px solid #e3e7eb}
.goals td{display:block;padding:0;border:0}.goals td:not(:first-child):before{content:attr(data-head) ': ';color:#59636e}
.goals td:not(:first-child) small{display:inline}
}
@media(prefers-color-scheme:dark){
body,table.f td:first-child,table.f th:first-child{background:#0d1117}
body{color:#e6edf3}.q,small,th,.goals td:not(:first-child):before{color:#9aa5b1}th,td,.goals tr{border-color:#2b323b}
.yes{color:#56d364}.no{color:#ff7b72}
.key.ours{background:#58a6ff}.key.floor{background:#8b949e}.key.peer{background:#9c7f4d}
}
";

/// All of it.
pub(super) fn page(results: &Results, tables: &Tables, figures: &[Figure]) -> String {
    let mut page = format!(
        "<!DOCTYPE html>\n<html xmlns=\"http://www.w3.org/1999/xhtml\" lang=\"en\">\n<head>\n<meta charset=\"utf-8\"/>\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\"/>\n\
         <title>virtproxy beside other ways into a guest</title>\n<style>\n{PAGE_STYLE}{STYLE}</style>\n</head>\n<body>\n\
         <h1>virtproxy beside other ways into a guest</h1>\n"
    );
    let quick = if results.quick {
        "A quick run, of fewer ways, cases and bytes. "
    } else {
        ""
    };
    let _ = writeln!(
        page,
        "<p class=\"q\">{quick}Begun {}, version {}.</p>",
        escaped(&results.begun),
        escaped(&results.version)
    );
    add_table(&mut page, &tables.goals, "goals");
    add_ways(&mut page, results);
    figures
        .iter()
        .for_each(|figure| add_figure(&mut page, figure));
    tables
        .figures
        .iter()
        .for_each(|table| add_table(&mut page, table, "f"));
    add_table(&mut page, &tables.gaps, "");
    page.push_str("<h2>Machine</h2>\n<ul>\n");
    for line in &results.machine {
        let _ = writeln!(page, "<li>{}</li>", escaped(line));
    }
    page.push_str("</ul>\n</body>\n</html>\n");
    page
}

fn add_ways(page: &mut String, results: &Results) {
    page.push_str("<h2>Ways</h2>\n<div class=\"wide\"><table class=\"ways\"><tbody>\n");
    for way in &results.ways {
        let (class, kind) = match way.kind {
            Kind::Ours => ("ours", "ours"),
            Kind::Floor => ("floor", "the floor under it"),
            Kind::Peer => ("peer", "a peer"),
        };
        let _ = writeln!(
            page,
            "<tr><td><span class=\"key {class}\"></span>{}</td><td>{}</td><td>{kind}</td></tr>",
            escaped(&way.key),
            escaped(&way.title)
        );
    }
    page.push_str("</tbody></table></div>\n");
}

fn add_figure(page: &mut String, figure: &Figure) {
    let _ = writeln!(
        page,
        "<h2>{}</h2>\n<p class=\"q\">{}</p>",
        escaped(figure.title),
        escaped(figure.caption)
    );
    page.push_str("<div class=\"panels\">\n");
    figure.panels().for_each(|panel| page.push_str(&panel));
    page.push_str("</div>\n");
}

fn add_table(page: &mut String, table: &Table, class: &str) {
    if table.rows.is_empty() {
        return;
    }
    let _ = writeln!(page, "<h2>{}</h2>", escaped(&table.title));
    if !table.note.is_empty() {
        let _ = writeln!(page, "<p class=\"q\">{}</p>", escaped(&table.note));
    }
    let _ = write!(
        page,
        "<div class=\"wide\"><table class=\"{class}\"><thead><tr>"
    );
    for name in &table.head {
        let _ = write!(page, "<th>{}</th>", escaped(name));
    }
    page.push_str("</tr></thead><tbody>\n");
    for row in &table.rows {
        page.push_str("<tr>");
        for (entry, head) in row.iter().zip(&table.head) {
            add_entry(page, entry, head);
        }
        page.push_str("</tr>\n");
    }
    page.push_str("</tbody></table></div>\n");
}

fn add_entry(page: &mut String, entry: &Entry, head: &str) {
    let main = escaped(&entry.main);
    let class = match main.chars().next() {
        Some('✓') => " class=\"yes\"",
        Some('✗') => " class=\"no\"",
        _ => "",
    };
    let _ = write!(
        page,
        "<td data-head=\"{}\"><span{class}>{main}</span>",
        escaped(head)
    );
    if !entry.small.is_empty() {
        let _ = write!(page, " <small>{}</small>", escaped(&entry.small));
    }
    page.push_str("</td>");
}

#[cfg(test)]
mod tests {
    use super::super::{plots, tables};
    use super::*;
    use crate::sample;

    #[test]
    fn the_page_is_well_formed_whatever_is_in_it() {
        let mut quick = sample::results();
        quick.quick = true;
        quick.version = "</title><script>\u{1}\"".to_owned();
        for results in [sample::results(), sample::empty(), quick] {
            let page = page(&results, &tables::all(&results), &plots::all(&results));
            let xml = page.strip_prefix("<!DOCTYPE html>\n").unwrap();
            let parsed =
                roxmltree::Document::parse(xml).unwrap_or_else(|error| panic!("{error}: {page}"));
            assert!(!parsed.descendants().any(|node| node.has_tag_name("script")));
        }
    }
}
