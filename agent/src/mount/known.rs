//! What the host has said of files before it was asked.

use super::attributes::Attributes;
use super::fresh::Fresh;
use super::message;
use super::whole::Whole;

/// All of it, for one mount.
#[derive(Debug, Default)]
pub struct Known {
    pub fresh: Fresh,
    pub attributes: Attributes,
    pub whole: Whole,
}

impl Known {
    /// Answers a request for which the host need not be asked; whether it was one.
    pub fn answer(&self, request: &[u8], answer: impl Fn(&[u8])) -> bool {
        if let Some(reply) = self.fresh.reply_to(request) {
            answer(&reply);
            return true;
        }
        if let Some(reply) = self.attributes.reply_to(request) {
            answer(&reply);
            return true;
        }
        self.whole.answer(request, answer)
    }

    /// The kernel is about to be told of this change on the host.
    pub fn note(&self, notification: &[u8]) {
        if let Some(node) = message::invalidated(notification) {
            self.fresh.forget(node);
            self.attributes.forget(node);
            self.whole.forget(node);
        }
        if let Some(node) = message::changed_directory(notification) {
            self.whole.forget(node);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_host_has_changed_is_asked_for_again() {
        let mut getattr = vec![0; message::IN_HEADER];
        getattr[4] = 3;
        getattr[16] = 7;
        let mut getxattr = getattr.clone();
        getxattr[4] = 22;
        getxattr.extend(b"\0\0\0\0\0\0\0\0security.capability\0");
        let known = Known::default();
        let is_known = |request: &[u8]| known.answer(request, |_| ());
        known.attributes.add(7, 1, &[0; 104]);
        known.fresh.add(7);
        let mut lookup = vec![0; message::IN_HEADER];
        lookup[4] = 1;
        lookup[16] = 7;
        lookup.extend(b"name\0");
        let mut change = vec![0; message::OUT_HEADER + 24];
        change[4] = 2;
        change[message::OUT_HEADER] = 7;
        // One that is cut off, one of a name, and one of another file.
        let mut others = [change.clone(), change.clone(), change.clone()];
        others[0].truncate(message::OUT_HEADER);
        others[1][4] = 3;
        others[2][message::OUT_HEADER] = 8;
        others.iter().for_each(|other| known.note(other));
        assert!(is_known(&getxattr) && is_known(&getattr));
        known.attributes.add(7, 2, &[0; 104]);
        known.note(&change);
        assert!(!is_known(&getxattr) && !is_known(&getattr));
        // One of a name, in another directory and in this one.
        for code in [2, 3] {
            known.whole.add(7, 1);
            change[4] = code;
            change[message::OUT_HEADER] = 8;
            known.note(&change);
            assert!(is_known(&lookup));
            change[message::OUT_HEADER] = 7;
            known.note(&change);
            assert!(!is_known(&lookup));
        }
    }
}
