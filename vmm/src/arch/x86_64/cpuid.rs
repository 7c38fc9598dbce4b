//! What CPUID tells the guest: what KVM supports on this host, with the topology of this machine.
//!
//! All vCPUs are cores of one package with one thread each, numbered by their APIC id. Leaves are
//! named as in the Intel SDM (volume 2, CPUID) and the AMD APM (volume 3, appendix E).

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

/// Leaf 1 ECX: there is CMPXCHG16B.
const CX16: u32 = 1 << 13;
/// Leaf 1 ECX: the local APIC timer takes a TSC deadline.
const TSC_DEADLINE: u32 = 1 << 24;
/// Leaf 1 ECX: this is a virtual machine.
const HYPERVISOR: u32 = 1 << 31;
/// Leaf 1 EDX: the package has more than one logical processor.
const HTT: u32 = 1 << 28;
/// Leaf 7 EBX and ECX: SGX and its launch control; a guest would need EPC memory for them.
const SGX: u32 = 1 << 2;
const SGX_LC: u32 = 1 << 30;
/// Leaf 0x80000001 ECX: cores, not hyperthreads (AMD).
const CMP_LEGACY: u32 = 1 << 1;
/// Leaf 0x80000007 EDX: the TSC runs at one rate in all power states.
const INVARIANT_TSC: u32 = 1 << 8;

/// The leaf with KVM's signature and its highest leaf.
const KVM_CPUID_SIGNATURE: u32 = 0x4000_0000;
/// The leaf with TSC and APIC bus frequencies in kHz, as VMware defined it.
const TIMING_INFO: u32 = 0x4000_0010;
/// The frequency of KVM's APIC bus.
const APIC_BUS_KHZ: u32 = 1_000_000;

/// Cache level from which on a cache is shared by the whole package.
const SHARED_CACHE_LEVEL: u32 = 3;

/// What is known about the machine beside KVM's supported leaves.
#[derive(Debug, Clone, Copy)]
pub struct Topology {
    /// Number of vCPUs.
    pub cpus: u8,
    /// Whether KVM's local APIC has a TSC deadline timer.
    pub tsc_deadline: bool,
    /// Whether the host's programs may use CMPXCHG16B. KVM has no part in that instruction: a guest's programs may
    /// where the host's may, also where KVM does not say so because the host's kernel does without.
    pub cmpxchg16b: bool,
    /// The guest's TSC frequency in kHz.
    pub tsc_khz: Option<u32>,
}

impl Topology {
    /// How many low bits of an APIC id tell the cores of the package apart.
    fn core_bits(self) -> u32 {
        u32::from(self.cpus).next_power_of_two().trailing_zeros()
    }
}

/// The leaves that are alike on all vCPUs, from those KVM supports.
pub fn shape(supported: &CpuId, topology: Topology) -> Vec<kvm_cpuid_entry2> {
    let is_amd = is_amd(supported);
    let mut leaves: Vec<_> = supported
        .as_slice()
        .iter()
        .filter(|leaf| !matches!(leaf.function, 0xb | 0x1f | 0x12 | TIMING_INFO))
        .copied()
        .collect();
    let max_leaf = leaves.iter().find(|l| l.function == 0).map_or(0, |l| l.eax);
    for leaf in &mut leaves {
        shape_leaf(leaf, topology, is_amd);
    }
    if max_leaf >= 0xb {
        leaves.extend(topology_leaves(0xb, topology));
    }
    if max_leaf >= 0x1f && !is_amd {
        leaves.extend(topology_leaves(0x1f, topology));
    }
    let timing = timing_leaf(&mut leaves, topology);
    leaves.extend(timing);
    leaves
}

/// The leaves of one vCPU: `shaped` with its APIC id.
pub fn for_vcpu(shaped: &[kvm_cpuid_entry2], apic_id: u8) -> Vec<kvm_cpuid_entry2> {
    let id = u32::from(apic_id);
    let mut leaves = shaped.to_vec();
    for leaf in &mut leaves {
        match leaf.function {
            0x1 => leaf.ebx = leaf.ebx & 0x00ff_ffff | id << 24,
            0xb | 0x1f => leaf.edx = id,
            0x8000_001e => {
                leaf.eax = id;
                // Core id in the low byte (one thread a core); node 0 of one.
                leaf.ebx = id & 0xff;
                leaf.ecx = 0;
            }
            _ => {}
        }
    }
    leaves
}

fn is_amd(supported: &CpuId) -> bool {
    supported.as_slice().iter().any(|leaf| {
        leaf.function == 0
            && matches!(
                &[leaf.ebx, leaf.edx, leaf.ecx]
                    .map(u32::to_le_bytes)
                    .concat()[..],
                b"AuthenticAMD" | b"HygonGenuine"
            )
    })
}

fn shape_leaf(leaf: &mut kvm_cpuid_entry2, topology: Topology, is_amd: bool) {
    let cpus = u32::from(topology.cpus);
    let core_ids = 1 << topology.core_bits();
    match leaf.function {
        0x1 => {
            leaf.ebx = leaf.ebx & 0xff00_ffff | cpus << 16;
            leaf.ecx |= HYPERVISOR;
            set(&mut leaf.ecx, TSC_DEADLINE, topology.tsc_deadline);
            set(&mut leaf.ecx, CX16, topology.cmpxchg16b);
            set(&mut leaf.edx, HTT, cpus > 1);
        }
        0x4 | 0x8000_001d if leaf.eax & 0x1f != 0 => {
            let level = leaf.eax >> 5 & 0x7;
            let sharing = if level >= SHARED_CACHE_LEVEL {
                core_ids
            } else {
                1
            };
            leaf.eax = leaf.eax & 0x0000_3fff | (sharing - 1) << 14;
            if leaf.function == 0x4 {
                // Six bits: a package of more than 64 cores is described by leaf 0xB only.
                leaf.eax |= (core_ids.min(64) - 1) << 26;
            }
        }
        0x7 if leaf.index == 0 => {
            set(&mut leaf.ebx, SGX, false);
            set(&mut leaf.ecx, SGX_LC, false);
        }
        0x8000_0001 if is_amd => set(&mut leaf.ecx, CMP_LEGACY, cpus > 1),
        0x8000_0008 if is_amd => {
            leaf.ecx = leaf.ecx & !0xf0ff | topology.core_bits() << 12 | (cpus - 1);
        }
        _ => {}
    }
}

fn set(register: &mut u32, bit: u32, on: bool) {
    *register = if on {
        *register | bit
    } else {
        *register & !bit
    };
}

/// Extended topology: thread level (one thread), core level (all vCPUs), and the end of the list.
fn topology_leaves(function: u32, topology: Topology) -> [kvm_cpuid_entry2; 3] {
    const LEVEL_SMT: u32 = 1 << 8;
    const LEVEL_CORE: u32 = 2 << 8;
    let leaf = |index, eax, ebx, kind| kvm_cpuid_entry2 {
        function,
        index,
        flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax,
        ebx,
        ecx: kind | index,
        ..Default::default()
    };
    [
        leaf(0, 0, 1, LEVEL_SMT),
        leaf(
            1,
            topology.core_bits(),
            u32::from(topology.cpus),
            LEVEL_CORE,
        ),
        leaf(2, 0, 0, 0),
    ]
}

/// The timing leaf, where the TSC's frequency is known and holds; KVM's highest leaf then covers it.
fn timing_leaf(leaves: &mut [kvm_cpuid_entry2], topology: Topology) -> Option<kvm_cpuid_entry2> {
    let tsc_khz = topology.tsc_khz?;
    leaves
        .iter()
        .find(|l| l.function == 0x8000_0007 && l.edx & INVARIANT_TSC != 0)?;
    let signature = leaves
        .iter_mut()
        .find(|l| l.function == KVM_CPUID_SIGNATURE)?;
    signature.eax = signature.eax.max(TIMING_INFO);
    Some(kvm_cpuid_entry2 {
        function: TIMING_INFO,
        eax: tsc_khz,
        ebx: APIC_BUS_KHZ,
        ..Default::default()
    })
}

/// How many bits a guest physical address has (leaf 0x80000008), 36 where KVM does not say.
pub fn physical_address_bits(supported: &CpuId) -> u32 {
    supported
        .as_slice()
        .iter()
        .find(|leaf| leaf.function == 0x8000_0008)
        .map_or(36, |leaf| leaf.eax & 0xff)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(function: u32, index: u32, eax: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 {
            function,
            index,
            eax,
            ..Default::default()
        }
    }

    fn vendor(name: &[u8; 12], max: u32) -> kvm_cpuid_entry2 {
        let word = |at: usize| u32::from_le_bytes(name[at..at + 4].try_into().unwrap());
        kvm_cpuid_entry2 {
            eax: max,
            ebx: word(0),
            edx: word(4),
            ecx: word(8),
            ..Default::default()
        }
    }

    fn host(name: &[u8; 12], max: u32) -> CpuId {
        let mut invariant = leaf(0x8000_0007, 0, 0);
        invariant.edx = INVARIANT_TSC;
        let mut sgx = leaf(7, 0, 0);
        sgx.ebx = SGX;
        CpuId::from_entries(&[
            vendor(name, max),
            kvm_cpuid_entry2 {
                function: 1,
                ebx: 0xab12_0800,
                ..Default::default()
            },
            // L1 data cache and L3 cache of a host with 16 cores.
            leaf(4, 0, 0xfc00_4121),
            leaf(4, 3, 0xfc03_c163),
            leaf(4, 4, 0),
            sgx,
            leaf(0xb, 0, 1),
            leaf(0xb, 1, 7),
            leaf(0x12, 0, 1),
            leaf(KVM_CPUID_SIGNATURE, 0, 0x4000_0001),
            leaf(0x8000_0001, 0, 0),
            invariant,
            leaf(0x8000_0008, 0, 0x302e),
            leaf(0x8000_001d, 0, 0x4121),
            leaf(0x8000_001d, 3, 0x1_c163),
            leaf(0x8000_001e, 0, 0),
        ])
        .unwrap()
    }

    fn machine(name: &[u8; 12], cpus: u8) -> Vec<kvm_cpuid_entry2> {
        let topology = Topology {
            cpus,
            tsc_deadline: true,
            cmpxchg16b: true,
            tsc_khz: Some(2_000_000),
        };
        shape(&host(name, 0x1f), topology)
    }

    fn find(leaves: &[kvm_cpuid_entry2], function: u32, index: u32) -> kvm_cpuid_entry2 {
        let found: Vec<_> = leaves
            .iter()
            .filter(|l| (l.function, l.index) == (function, index))
            .collect();
        assert_eq!(found.len(), 1, "leaf {function:#x}.{index}");
        *found[0]
    }

    #[test]
    fn the_topology_leaves_agree_with_each_other_for_every_count() {
        for cpus in 1..=255u8 {
            let leaves = machine(b"GenuineIntel", cpus);
            let bits = find(&leaves, 0xb, 1).eax;
            assert!(u32::from(cpus) <= 1 << bits, "{cpus} CPUs in {bits} bits");
            assert!(bits == 0 || u32::from(cpus) > 1 << (bits - 1));
            assert_eq!(find(&leaves, 0xb, 1).ebx, u32::from(cpus));
            assert_eq!(find(&leaves, 0xb, 0).ebx, 1);
            assert_eq!(find(&leaves, 0xb, 0).ecx, 0x100);
            assert_eq!(find(&leaves, 0xb, 2).ecx >> 8, 0);
            assert_eq!(find(&leaves, 0x1f, 1).ebx, u32::from(cpus));
            assert_eq!(find(&leaves, 1, 0).ebx >> 16 & 0xff, u32::from(cpus));
            let l3 = find(&leaves, 4, 3).eax;
            assert_eq!((l3 >> 14 & 0xfff) + 1, 1 << bits, "{cpus} CPUs share L3");
            assert_eq!((l3 >> 26) + 1, (1 << bits).min(64));
            assert_eq!(find(&leaves, 4, 0).eax >> 14 & 0xfff, 0, "L1 is private");
            assert_eq!(find(&leaves, 4, 4).eax, 0, "the end of the list stays");
        }
    }

    #[test]
    fn amd_leaves_name_the_cores() {
        let leaves = machine(b"AuthenticAMD", 6);
        assert_eq!(find(&leaves, 0x8000_0008, 0).ecx, 3 << 12 | 5);
        assert_eq!(find(&leaves, 0x8000_0001, 0).ecx, CMP_LEGACY);
        assert_eq!(find(&leaves, 0x8000_001d, 3).eax >> 14, 7);
        assert_eq!(find(&leaves, 0x8000_001d, 0).eax >> 14, 0);
        let third = for_vcpu(&leaves, 3);
        assert_eq!(find(&third, 0x8000_001e, 0).eax, 3);
        assert_eq!(find(&third, 0x8000_001e, 0).ebx, 3);
        assert!(!leaves.iter().any(|l| l.function == 0x1f));
    }

    #[test]
    fn every_vcpu_has_its_own_apic_id() {
        let leaves = machine(b"GenuineIntel", 255);
        for id in [0, 1, 254] {
            let own = for_vcpu(&leaves, id);
            assert_eq!(
                find(&own, 1, 0).ebx,
                u32::from(id) << 24 | 255 << 16 | 0x800
            );
            for index in 0..3 {
                assert_eq!(find(&own, 0xb, index).edx, u32::from(id));
            }
        }
    }

    #[test]
    fn features_without_backing_are_gone_and_the_hypervisor_shows() {
        let leaves = machine(b"GenuineIntel", 1);
        assert_eq!(find(&leaves, 7, 0).ebx & SGX, 0);
        assert!(!leaves.iter().any(|l| l.function == 0x12));
        assert_ne!(find(&leaves, 1, 0).ecx & HYPERVISOR, 0);
        assert_ne!(find(&leaves, 1, 0).ecx & TSC_DEADLINE, 0);
        assert_eq!(find(&leaves, 1, 0).edx & HTT, 0, "one CPU is no multi-core");
        assert_eq!(find(&leaves, TIMING_INFO, 0).eax, 2_000_000);
        assert_eq!(find(&leaves, KVM_CPUID_SIGNATURE, 0).eax, TIMING_INFO);
    }

    #[test]
    fn a_host_without_extended_topology_gets_none() {
        let topology = Topology {
            cpus: 2,
            tsc_deadline: false,
            cmpxchg16b: false,
            tsc_khz: None,
        };
        let leaves = shape(&host(b"AuthenticAMD", 0xa), topology);
        assert!(!leaves.iter().any(|l| l.function == 0xb));
        assert!(!leaves.iter().any(|l| l.function == TIMING_INFO));
        assert_eq!(find(&leaves, 1, 0).ecx & TSC_DEADLINE, 0);
    }
}
