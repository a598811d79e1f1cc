//! How the members of a generation agree on NCCL, and on the name of their communicator.
//!
//! Each says over the mesh what it has; all draw the same conclusion from what all have said. Rank 0's message carries the
//! communicator's id. So the coordinator knows nothing of NCCL, and an id never outlives its generation.

use kernels::nccl::{MULTI_RANK, UNIQUE_ID_BYTES, UniqueId, Version};

/// Identifies a device, as its driver does.
pub type GpuId = [u8; 16];

/// What a member brings.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Offer {
    /// Version of its library.
    pub version: Version,
    /// Its device.
    pub gpu: GpuId,
    /// Whether it may share the device with another member.
    pub shares: bool,
    /// A name for the communicator; of rank 0 only.
    pub id: Option<UniqueId>,
}

/// What a member says: an offer, or why it has none.
pub type Said = Result<Offer, String>;

/// Longest reason that travels.
const REASON_BYTES: usize = 512;

const NO: u8 = 0;
const OFFER: u8 = 1;

/// As bytes: 0 and a reason, or 1, version, device, whether it is shared, and the id if there is one.
pub fn encode(said: &Said) -> Vec<u8> {
    match said {
        Err(reason) => {
            let cut = reason.char_indices().map(|(at, _)| at).take_while(|at| *at <= REASON_BYTES).last();
            let reason = if reason.len() > REASON_BYTES { &reason[..cut.unwrap_or(0)] } else { reason };
            [&[NO], reason.as_bytes()].concat()
        }
        Ok(Offer { version, gpu, shares, id }) => {
            let mut bytes = vec![OFFER];
            bytes.extend(version.code().to_le_bytes());
            bytes.extend(gpu);
            bytes.push(u8::from(*shares));
            bytes.extend(id.iter().flatten());
            bytes
        }
    }
}

/// `None` if it is not what [`encode`] makes.
pub fn decode(bytes: &[u8]) -> Option<Said> {
    let (kind, rest) = bytes.split_first()?;
    if *kind == NO {
        return Some(Err(String::from_utf8_lossy(rest).into_owned()));
    }
    let (version, rest) = rest.split_first_chunk::<4>()?;
    let (gpu, rest) = rest.split_first_chunk::<16>()?;
    let (shares, id) = rest.split_first()?;
    let id = match id.len() {
        0 => None,
        UNIQUE_ID_BYTES => Some(id.try_into().expect("the length was checked")),
        _ => return None,
    };
    let version = Version::from_code(u32::from_le_bytes(*version));
    (*kind == OFFER && *shares <= 1).then_some(Ok(Offer { version, gpu: *gpu, shares: *shares == 1, id }))
}

/// The id of the communicator if all members can be part of it, else why not, in words: the same on every member.
/// `said` is by rank.
pub fn agree(names: &[&str], said: &[Said]) -> Result<UniqueId, String> {
    let mut offers = Vec::with_capacity(said.len());
    for (name, said) in names.iter().zip(said) {
        match said {
            Ok(offer) => offers.push((name, offer)),
            Err(reason) => return Err(format!("worker {name}: {reason}")),
        }
    }
    let (first_name, first) = offers[0];
    for (name, offer) in &offers[1..] {
        if offer.version != first.version {
            return Err(format!(
                "worker {first_name} has NCCL {}, worker {name} has {}",
                first.version, offer.version
            ));
        }
    }
    for (at, (name, offer)) in offers.iter().enumerate() {
        let Some((other_name, other)) = offers[..at].iter().find(|(_, other)| other.gpu == offer.gpu) else {
            continue;
        };
        if !(offer.shares && other.shares) {
            return Err(format!("workers {other_name} and {name} are on one device"));
        }
        if offer.version < MULTI_RANK {
            return Err(format!(
                "workers {other_name} and {name} are on one device, which NCCL {} does not allow; {MULTI_RANK} does",
                offer.version
            ));
        }
    }
    first.id.ok_or_else(|| format!("worker {first_name} gave no name for a communicator"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn offer(gpu: u8) -> Offer {
        let id = (gpu == 0).then_some([7; UNIQUE_ID_BYTES]);
        Offer { version: Version::from_code(22304), gpu: [gpu; 16], shares: false, id }
    }

    #[test]
    fn what_is_said_comes_back_from_its_bytes() {
        let no = Err("there is no libnccl.so.2".to_owned());
        for said in [Ok(offer(0)), Ok(offer(1)), Ok(Offer { shares: true, ..offer(2) }), no] {
            assert_eq!(decode(&encode(&said)), Some(said));
        }
        let long = decode(&encode(&Err("é".repeat(1000)))).unwrap().unwrap_err();
        assert!(long.len() <= REASON_BYTES && long.chars().all(|char| char == 'é'), "{long}");
        for bytes in [&[][..], &[1], &[2; 22], &[1; 23], &[1; 21]] {
            assert_eq!(decode(bytes), None, "{bytes:?}");
        }
    }

    #[test]
    fn all_members_agree_or_know_why_not() {
        let names = ["a", "b", "c"];
        let agreed = |said: [Said; 3]| agree(&names, &said);
        assert_eq!(agreed([Ok(offer(0)), Ok(offer(1)), Ok(offer(2))]), Ok([7; UNIQUE_ID_BYTES]));
        let refused = |said| agreed(said).unwrap_err();
        assert_eq!(refused([Ok(offer(0)), Err("no library".into()), Ok(offer(2))]), "worker b: no library");
        let newer = Offer { version: Version::from_code(22405), ..offer(2) };
        assert_eq!(
            refused([Ok(offer(0)), Ok(offer(1)), Ok(newer)]),
            "worker a has NCCL 2.23.4, worker c has 2.24.5"
        );
        assert_eq!(refused([Ok(offer(0)), Ok(offer(1)), Ok(offer(1))]), "workers b and c are on one device");
        let shared = |gpu| Ok(Offer { shares: true, ..offer(gpu) });
        assert_eq!(
            refused([shared(0), shared(1), shared(1)]),
            "workers b and c are on one device, which NCCL 2.23.4 does not allow; 2.30.3 does"
        );
        let able = |gpu| Ok(Offer { shares: true, version: MULTI_RANK, ..offer(gpu) });
        assert_eq!(agreed([able(0), able(1), able(1)]), Ok([7; UNIQUE_ID_BYTES]));
        assert_eq!(
            refused([Ok(offer(3)), Ok(offer(1)), Ok(offer(2))]),
            "worker a gave no name for a communicator"
        );
    }
}
