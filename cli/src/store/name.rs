//! Names of machines: what may be one, and what a machine is called that was given none.

use std::fmt;
use std::str::FromStr;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use thiserror::Error;

/// The longest name, in bytes: it is the guest's host name too, and those are not longer.
const MAX: usize = 63;

/// The name of a machine: also its host name, and the name of its files.
///
/// Letters, digits, `-`, `_` and `.`, beginning with a letter or digit, so that no name leads out of a
/// directory or is a hidden file.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Name(String);

/// Why something is no name.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum NameError {
    /// Nothing, or too much.
    #[error("a machine's name has 1 to {MAX} characters")]
    Length,
    /// A character that is not allowed, or not at that place.
    #[error(
        "a machine's name is made of letters, digits, `-`, `_` and `.`, and starts with a letter or digit"
    )]
    Character,
}

impl Name {
    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// A name nobody chose, such as `quiet-otter`; with a number behind it where `attempt` is not 0.
    pub fn generate(attempt: u32) -> Result<Self> {
        let mut random = [0u8; 2];
        rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty())
            .context("the host gives no random bytes")?;
        let [first, second] = random.map(usize::from);
        let word = |list: &[&'static str], at: usize| list.get(at % list.len()).copied();
        let adjective = word(ADJECTIVES, first).unwrap_or_default();
        let noun = word(NOUNS, second).unwrap_or_default();
        Ok(Self(match attempt {
            0 => format!("{adjective}-{noun}"),
            _ => format!("{adjective}-{noun}-{attempt}"),
        }))
    }

    /// Those of `names` that somebody may have meant who wrote this one, the nearest first.
    pub fn near(&self, names: &[Self]) -> Vec<Self> {
        let mut near: Vec<_> = names
            .iter()
            .filter_map(|name| {
                let changes = strsim::damerau_levenshtein(&self.0, &name.0);
                let begins = name.0.starts_with(&self.0) || self.0.starts_with(&name.0);
                (changes <= (self.0.len() / 3).clamp(1, 2) || begins)
                    .then_some((changes, name.clone()))
            })
            .collect();
        near.sort();
        near.into_iter().map(|(_, name)| name).take(3).collect()
    }
}

impl FromStr for Name {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        let fine = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        if text.is_empty() || text.len() > MAX {
            return Err(NameError::Length);
        }
        if !text.starts_with(|c: char| c.is_ascii_alphanumeric()) || !text.chars().all(fine) {
            return Err(NameError::Character);
        }
        Ok(Self(text.to_owned()))
    }
}

impl TryFrom<String> for Name {
    type Error = NameError;

    fn try_from(text: String) -> Result<Self, NameError> {
        text.parse()
    }
}

impl From<Name> for String {
    fn from(name: Name) -> Self {
        name.0
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

const ADJECTIVES: &[&str] = &[
    "able", "amber", "azure", "bold", "brave", "brisk", "bright", "calm", "clever", "cosy",
    "crisp", "daring", "deft", "eager", "early", "fair", "fancy", "fleet", "fond", "frank",
    "fresh", "gentle", "glad", "golden", "grand", "green", "happy", "hardy", "honest", "jolly",
    "keen", "kind", "lively", "lucid", "lucky", "mellow", "merry", "mild", "neat", "nimble",
    "noble", "patient", "plucky", "polite", "proud", "quick", "quiet", "rapid", "ready", "rosy",
    "sharp", "silent", "smart", "snug", "solid", "steady", "sunny", "swift", "tidy", "vivid",
    "warm", "wise", "witty", "young",
];

const NOUNS: &[&str] = &[
    "acorn", "alder", "aspen", "badger", "beaver", "birch", "bison", "breeze", "brook", "canyon",
    "cedar", "cliff", "comet", "condor", "coral", "crane", "creek", "dune", "eagle", "ember",
    "falcon", "fern", "finch", "fjord", "forest", "fox", "gecko", "glacier", "grove", "harbor",
    "hare", "hawk", "heron", "hill", "island", "ivy", "lagoon", "lake", "lark", "lynx", "maple",
    "marten", "meadow", "moss", "oak", "orca", "otter", "owl", "pebble", "pine", "plover", "raven",
    "reef", "river", "robin", "sparrow", "spruce", "stone", "summit", "swan", "thrush", "tiger",
    "valley", "willow",
];

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> Name {
        text.parse().unwrap()
    }

    #[test]
    fn what_could_lead_elsewhere_is_no_name() {
        for bad in [
            "", ".", "..", "a/b", "/", "-f", ".new", "a b", "a\n", "ä", "a\0",
        ] {
            assert!(bad.parse::<Name>().is_err(), "{bad:?} was taken");
        }
        assert_eq!("n".repeat(300).parse::<Name>(), Err(NameError::Length));
        for good in ["a", "A.b_c-9", "0", &"n".repeat(63)] {
            assert_eq!(name(good).as_str(), good);
        }
    }

    #[test]
    fn generated_names_are_names() {
        for attempt in 0..500 {
            let generated = Name::generate(attempt % 3).unwrap();
            assert_eq!(generated.as_str().parse(), Ok(generated.clone()));
        }
    }

    #[test]
    fn near_names_are_found_and_others_are_not() {
        let names = [name("web"), name("webserver"), name("db"), name("wbe2")];
        assert_eq!(name("wbe").near(&names), [name("wbe2"), name("web")]);
        assert_eq!(name("webs").near(&names), [name("web"), name("webserver")]);
        assert_eq!(name("zzzzzz").near(&names), []);
    }
}
