//! docs/guide/nacre.toml is a configuration, it says what the defaults are, and it leaves no key out.

use nacre_guest::config::Config;

const EXAMPLE: &str = include_str!("../../../docs/guide/nacre.toml");

/// The example with every key, those behind a "#" too.
fn everything() -> String {
    EXAMPLE.lines().map(|line| line.strip_prefix('#').filter(|rest| !rest.starts_with(' ')).unwrap_or(line)).fold(
        String::new(),
        |mut text, line| {
            text.push_str(line);
            text.push('\n');
            text
        },
    )
}

#[test]
fn the_example_is_the_default() {
    let example = Config::parse(EXAMPLE.as_bytes(), "nacre.toml").unwrap();
    assert_eq!(format!("{example:#?}"), format!("{:#?}", Config::default()));
}

#[test]
fn every_key_is_in_the_example() {
    let text = everything();
    Config::parse(text.as_bytes(), "nacre.toml").unwrap();
    let example: toml::Table = toml::from_str(&text).unwrap();
    for table in [
        "",
        "trust",
        "trust.admission",
        "image",
        "image.limits",
        "lazy",
        "registries",
        "registry",
        "registry.proxy",
        "broker",
    ] {
        let head = if table.is_empty() { String::new() } else { format!("[{table}]\n") };
        // The refusal of an unknown key names all those that there are.
        let error = Config::parse(format!("{head}no-such-key = 1\n").as_bytes(), "x").unwrap_err().to_string();
        let (_, known) = error.split_once("expected").unwrap();
        let known: Vec<&str> = known.split('`').skip(1).step_by(2).collect();
        assert!(!known.is_empty(), "{error}");
        let found = table.split('.').filter(|part| !part.is_empty()).fold(&example, |table, part| {
            let inner = table.get(part).and_then(toml::Value::as_table);
            inner.unwrap()
        });
        for key in known {
            assert!(found.contains_key(key), "[{table}] {key} is not in docs/guide/nacre.toml");
        }
    }
}
