//! `WWW-Authenticate` (RFC 9110 §11.6.1): what a registry wants before it answers.
//!
//! Grammar read: a comma-separated list of `scheme [token68 | name=value, …]`, values as tokens or quoted strings. What does not
//! fit ends the reading, and the challenges before it count.

/// The most bytes of one header.
const HEADER_LIMIT: usize = 16 << 10;
/// The most challenges, and parameters of each, that are read.
const COUNT_LIMIT: usize = 32;

/// One challenge.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Challenge {
    /// The scheme, lower case: `basic`, `bearer`.
    pub scheme: String,
    /// The parameters, names in lower case.
    pub parameters: Vec<(String, String)>,
}

impl Challenge {
    /// A parameter's value; the first one counts.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.parameters.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }
}

/// Reads the value of one `WWW-Authenticate` header.
pub fn parse_challenges(header: &[u8]) -> Vec<Challenge> {
    let mut out: Vec<Challenge> = Vec::new();
    let Some(text) = std::str::from_utf8(header).ok().filter(|text| text.len() <= HEADER_LIMIT) else { return out };
    let mut input = Input(text);
    loop {
        input.skip(|b| matches!(b, b' ' | b'\t' | b','));
        let Some(word) = input.token() else { return out };
        input.skip(is_space);
        if input.eat('=') {
            // `name=value` belongs to the challenge before it; a token68 may end in `=` too, and then there is no value.
            input.skip(is_space);
            let Some(value) = input.value() else { return out };
            let Some(challenge) = out.last_mut() else { return out };
            if challenge.parameters.len() == COUNT_LIMIT {
                return out;
            }
            challenge.parameters.push((word.to_ascii_lowercase(), value));
        } else {
            if out.len() == COUNT_LIMIT {
                return out;
            }
            out.push(Challenge { scheme: word.to_ascii_lowercase(), parameters: Vec::new() });
        }
    }
}

struct Input<'a>(&'a str);

impl<'a> Input<'a> {
    fn skip(&mut self, what: impl Fn(u8) -> bool) {
        let count = self.0.bytes().take_while(|b| what(*b)).count();
        self.0 = self.0.get(count..).unwrap_or_default();
    }

    fn eat(&mut self, what: char) -> bool {
        self.0.strip_prefix(what).map(|rest| self.0 = rest).is_some()
    }

    fn token(&mut self) -> Option<&'a str> {
        let count = self.0.bytes().take_while(|b| is_token(*b)).count();
        let (token, rest) = self.0.split_at_checked(count).filter(|(token, _)| !token.is_empty())?;
        self.0 = rest;
        Some(token)
    }

    fn value(&mut self) -> Option<String> {
        if !self.eat('"') {
            // Registries leave quotes out around URLs; so anything up to a separator is taken.
            let count = self.0.bytes().take_while(|b| b.is_ascii_graphic() && !matches!(b, b',' | b'"')).count();
            let (value, rest) = self.0.split_at_checked(count).filter(|(value, _)| !value.is_empty())?;
            self.0 = rest;
            return Some(value.to_owned());
        }
        let mut value = String::new();
        let mut chars = self.0.chars();
        loop {
            match chars.next()? {
                '"' => break,
                '\\' => value.push(chars.next()?),
                other => value.push(other),
            }
        }
        self.0 = chars.as_str();
        Some(value)
    }
}

fn is_space(byte: u8) -> bool {
    matches!(byte, b' ' | b'\t')
}

fn is_token(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_registries_send_is_read() {
        let all = parse_challenges(
            br#"Bearer realm="https://auth.example/token?a=b,c",service="r.example",scope="repository:a/b:pull,push", Basic realm="x \"y\"""#,
        );
        assert_eq!(all.len(), 2);
        assert_eq!(all[0].scheme, "bearer");
        assert_eq!(all[0].get("realm"), Some("https://auth.example/token?a=b,c"));
        assert_eq!(all[0].get("scope"), Some("repository:a/b:pull,push"));
        assert_eq!(all[1].get("realm"), Some("x \"y\""));
        let bare = parse_challenges(b"BEARER Realm = https://a/token , Service=r,, Negotiate");
        assert_eq!(bare[0].get("realm"), Some("https://a/token"));
        assert_eq!(bare[0].get("service"), Some("r"));
        assert_eq!(bare[1], Challenge { scheme: "negotiate".into(), parameters: vec![] });
    }

    #[test]
    fn garbage_gives_little_and_ends() {
        for text in [
            &b""[..],
            b",,,,",
            b"=",
            b"a=b",
            b"\"",
            b"Bearer realm=\"unfinished",
            b"Bearer realm=\"x\\",
            b"Bearer realm=",
            b"Bearer \x80",
            "Bearer réalm=é".as_bytes(),
        ] {
            assert!(parse_challenges(text).iter().all(|c| c.parameters.is_empty()), "{text:?}");
        }
        assert!(parse_challenges(&vec![b'a'; HEADER_LIMIT + 1]).is_empty());
        assert_eq!(parse_challenges("a ".repeat(1000).as_bytes()).len(), COUNT_LIMIT);
        assert_eq!(parse_challenges(format!("a {}", "b=c,".repeat(1000)).as_bytes())[0].parameters.len(), COUNT_LIMIT);
    }
}
