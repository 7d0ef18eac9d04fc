//! Reads the machine's own apt sources, so that the project needs to name no mirror.
//!
//! Debian and Ubuntu write them in two forms: one line each (`deb [signed-by=KEY] URI SUITE COMPONENT...`) or stanzas
//! (deb822: `Types:`, `URIs:`, `Suites:`, `Components:`, `Signed-By:`). From them the lab takes the address of the
//! distribution's main archive and how it is verified, and asks the same archive for another suite.

use anyhow::{Context, Result, bail};
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

/// One entry of the machine's sources.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Source {
    /// Where the archive is.
    pub(crate) uris: Vec<String>,
    /// Suites, such as `bookworm`.
    pub(crate) suites: Vec<String>,
    /// Components, such as `main`.
    pub(crate) components: Vec<String>,
    /// How it is verified, keys in lower case: `signed-by`, `trusted`, ...
    pub(crate) options: Vec<(String, String)>,
}

/// Options that say how an archive is verified or reached; the others (architectures, languages) are the lab's own.
const CARRIED: &[&str] = &[
    "signed-by",
    "trusted",
    "allow-insecure",
    "allow-weak",
    "allow-downgrade-to-insecure",
    "check-valid-until",
    "check-date",
    "date-max-future",
    "by-hash",
    "inrelease-path",
];

/// Reads the one-line form.
pub(crate) fn parse_lines(text: &str) -> Vec<Source> {
    text.lines().filter_map(parse_line).collect()
}

fn parse_line(line: &str) -> Option<Source> {
    let line = line.split('#').next()?.trim();
    let rest = line.strip_prefix("deb")?;
    if !rest.starts_with([' ', '\t', '[']) {
        return None; // deb-src
    }
    let rest = rest.trim_start();
    let (options, rest) = match rest.strip_prefix('[') {
        Some(inner) => inner.split_once(']')?,
        None => ("", rest),
    };
    let options = options
        .split_whitespace()
        .filter_map(|option| option.split_once('='))
        .map(|(key, value)| (key.to_ascii_lowercase(), value.replace(',', " ")))
        .collect();
    let mut words = rest.split_whitespace().map(str::to_owned);
    Some(Source {
        uris: vec![words.next()?],
        suites: vec![words.next()?],
        components: words.collect(),
        options,
    })
}

/// Reads the stanza form (deb822). A value may go on over indented lines, as an embedded key does.
pub(crate) fn parse_stanzas(text: &str) -> Vec<Source> {
    let mut sources = Vec::new();
    let mut fields: Vec<(String, String)> = Vec::new();
    for line in text
        .lines()
        .filter(|line| !line.starts_with('#'))
        .chain([""])
    {
        if line.trim().is_empty() {
            sources.extend(source_of(&std::mem::take(&mut fields)));
        } else if line.starts_with([' ', '\t']) {
            if let Some((_, value)) = fields.last_mut() {
                value.push('\n');
                value.push_str(line);
            }
        } else if let Some((key, value)) = line.split_once(':') {
            fields.push((key.trim().to_ascii_lowercase(), value.trim().to_owned()));
        }
    }
    sources
}

fn source_of(fields: &[(String, String)]) -> Option<Source> {
    let field = |name: &str| {
        fields
            .iter()
            .find(|(key, _)| key == name)
            .map_or("", |(_, value)| value)
    };
    let words = |name: &str| {
        field(name)
            .split_whitespace()
            .map(str::to_owned)
            .collect::<Vec<_>>()
    };
    if field("enabled").eq_ignore_ascii_case("no")
        || !words("types").iter().any(|kind| kind == "deb")
    {
        return None;
    }
    let options = fields
        .iter()
        .filter(|(key, _)| CARRIED.contains(&key.as_str()))
        .cloned()
        .collect();
    Some(Source {
        uris: words("uris"),
        suites: words("suites"),
        components: words("components"),
        options,
    })
}

/// Every source that `sources.list` and `sources.list.d` under `etc_apt` enable.
pub(crate) fn read(etc_apt: &Path) -> Result<Vec<Source>> {
    let mut files: Vec<PathBuf> = fs::read_dir(etc_apt.join("sources.list.d"))
        .map(|entries| entries.flatten().map(|entry| entry.path()).collect())
        .unwrap_or_default();
    files.sort();
    files.insert(0, etc_apt.join("sources.list"));
    let mut sources = Vec::new();
    for file in files.iter().filter(|file| file.is_file()) {
        let text =
            || fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()));
        match file.extension().and_then(|extension| extension.to_str()) {
            Some("list") => sources.extend(parse_lines(&text()?)),
            Some("sources") => sources.extend(parse_stanzas(&text()?)),
            _ => {}
        }
    }
    Ok(sources)
}

/// The distribution's own archive among `sources`: the entry that offers the machine's release, else the one whose
/// address ends like the distribution's archives do.
pub(crate) fn archive<'a>(
    sources: &'a [Source],
    distribution: &str,
    codename: &str,
) -> Result<&'a Source> {
    let usable = |source: &&Source| {
        source
            .components
            .iter()
            .any(|component| component == "main")
            && source.uris.iter().any(|uri| !uri.starts_with("cdrom:"))
    };
    let is_release = |source: &&Source| {
        source.suites.iter().any(|suite| {
            !codename.is_empty() && suite == codename
                || ["stable", "testing", "unstable", "sid"].contains(&suite.as_str())
        })
    };
    let looks_like_it = |source: &&Source| {
        source.uris.iter().any(|uri| {
            uri.trim_end_matches('/')
                .ends_with(&format!("/{distribution}"))
        })
    };
    let found = sources.iter().filter(usable).find(is_release);
    match found.or_else(|| sources.iter().filter(usable).find(looks_like_it)) {
        Some(source) => Ok(source),
        None => bail!(
            "apt has no source for the main {distribution} archive: enable one in /etc/apt/sources.list.d, \
             or fill the cache on another machine and name it with VIRTPROXY_CACHE"
        ),
    }
}

impl Source {
    /// The stanza that asks the same archive for other suites.
    pub(crate) fn stanza(&self, suites: &[String], components: &[&str]) -> String {
        let uris: Vec<_> = self
            .uris
            .iter()
            .filter(|uri| !uri.starts_with("cdrom:"))
            .cloned()
            .collect();
        let mut text = format!(
            "Types: deb\nURIs: {}\nSuites: {}\nComponents: {}\n",
            uris.join(" "),
            suites.join(" "),
            components.join(" ")
        );
        for (key, value) in self
            .options
            .iter()
            .filter(|(key, _)| CARRIED.contains(&key.as_str()))
        {
            let _ = writeln!(text, "{key}: {value}");
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STANZAS: &str = "\
# comment
Types: deb deb-src
URIs: http://mirror.example/debian
Suites: bookworm bookworm-updates
# inside
Components: main
Signed-By:
 -----BEGIN PGP PUBLIC KEY BLOCK-----
 .
 abc

Enabled: no
Types: deb
URIs: http://off.example/debian
Suites: bookworm
Components: main

Types: deb
URIs: http://mirror.example/debian-security
Suites: bookworm-security
Components: main
";

    #[test]
    fn stanzas_with_an_embedded_key() {
        let sources = parse_stanzas(STANZAS);
        assert_eq!(sources.len(), 2);
        let archive = archive(&sources, "debian", "bookworm").unwrap();
        assert_eq!(archive.suites, ["bookworm", "bookworm-updates"]);
        let stanza = archive.stanza(&["trixie".to_owned()], &["main"]);
        assert!(stanza.contains("Suites: trixie\n"), "{stanza}");
        assert!(
            stanza.ends_with("signed-by: \n -----BEGIN PGP PUBLIC KEY BLOCK-----\n .\n abc\n"),
            "{stanza}"
        );
    }

    #[test]
    fn lines_with_options() {
        let sources = parse_lines(
            "# deb http://no.example/debian a main\n\
             deb-src http://mirror.example/debian bookworm main\n\
             deb cdrom:[Debian 12]/ bookworm main\n\
             deb [arch=amd64 signed-by=/usr/share/keyrings/k.gpg] http://mirror.example/debian bookworm main contrib # x\n\
             deb\thttp://mirror.example/debian-security bookworm-security main\n",
        );
        let archive = archive(&sources, "debian", "bookworm").unwrap();
        assert_eq!(archive.uris, ["http://mirror.example/debian"]);
        let stanza = archive.stanza(
            &["trixie".to_owned(), "trixie-backports".to_owned()],
            &["main"],
        );
        assert!(
            stanza.contains("signed-by: /usr/share/keyrings/k.gpg\n"),
            "{stanza}"
        );
        assert!(!stanza.contains("arch"), "{stanza}");
    }

    #[test]
    fn an_archive_is_known_by_its_address_when_no_release_fits() {
        let sources = parse_lines(
            "deb http://a.example/tools x main\ndeb http://b.example/debian/ odd main\n",
        );
        assert_eq!(
            archive(&sources, "debian", "").unwrap().uris,
            ["http://b.example/debian/"]
        );
        let error = archive(&sources[..1], "debian", "")
            .unwrap_err()
            .to_string();
        assert!(error.contains("sources.list.d"), "{error}");
    }
}
