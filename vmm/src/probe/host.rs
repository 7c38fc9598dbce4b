//! Facilities of the host besides KVM.
