# The default appraisal of a CPU's TEE: what its evidence is worth (AR4SI values).
# Everything that is not recognised stays at a value that the resource policy denies.
package policy

import rego.v1

# 33: executables that are not recognised. 97: hardware that is not recognised. 36: configuration that is not known to be good.
default executables := 33

default hardware := 97

default configuration := 36

# 0: nothing is asserted, since nothing was measured.
default file_system := 0

default storage_opaque := 0

trust_claims := {
	"executables": executables,
	"hardware": hardware,
	"configuration": configuration,
	"file-system": file_system,
	"instance-identity": 0,
	"runtime-opaque": 0,
	"storage-opaque": storage_opaque,
	"sourced-data": 0,
}

##### sim: a simulated TEE. The broker admits it only where its settings say so, and marks the token.

# 3: only approved executables were loaded.
executables := 3 if input.sim.measurement in query_reference_value("sim.measurement")

# 2: a platform that is recognised (the broker has verified its signature) at a security version that is good.
hardware := 2 if {
	input.sim.simulated == true
	sim_svn_is_good
}

sim_svn_is_good if query_reference_value("sim.svn") == null

sim_svn_is_good if input.sim.svn in query_reference_value("sim.svn")

# 2: a known and approved configuration: init data that a reference value names.
configuration := 2 if {
	input.sim.debug == false
	input.sim.init_data in query_reference_value("sim.init_data")
}

# 3: no known vulnerability: nobody said which init data are good, and nobody can look in.
configuration := 3 if {
	input.sim.debug == false
	query_reference_value("sim.init_data") == null
}

##### sample: what Trustee's programs say where there is no TEE. Nothing is measured, anybody can say it; the broker admits it as it does sim.

executables := 3 if sample_is_recognised

hardware := 2 if sample_is_recognised

configuration := 2 if sample_is_recognised

sample_is_recognised if {
	input.sample.simulated == true
	input.sample.svn in query_reference_value("sample.svn")
}

##### SNP. Debug, VMPL, certificates and the TCB's signature are the verifier's rules; here, which guest and which firmware.

executables := 3 if input.snp.measurement in query_reference_value("snp_launch_measurement")

hardware := 2 if {
	input.snp.reported_tcb_bootloader in query_reference_value("snp_bootloader")
	input.snp.reported_tcb_microcode in query_reference_value("snp_microcode")
	input.snp.reported_tcb_snp in query_reference_value("snp_snp_svn")
	input.snp.reported_tcb_tee in query_reference_value("snp_tee_svn")
}

configuration := 2 if {
	snp_configuration_is_good
	input.snp.init_data in query_reference_value("snp_init_data")
}

configuration := 3 if {
	snp_configuration_is_good
	query_reference_value("snp_init_data") == null
}

snp_configuration_is_good if {
	input.snp.policy_debug_allowed == false
	input.snp.policy_migrate_ma == false
	input.snp.vmpl == 0
}

##### TDX. The kernel, its command line and its initrd are in RTMR 1 and 2, the firmware in the launch measurement.

executables := 3 if {
	input.tdx.quote.body.mr_td in query_reference_value("mr_td")
	input.tdx.quote.body.rtmr_1 in query_reference_value("rtmr_1")
	input.tdx.quote.body.rtmr_2 in query_reference_value("rtmr_2")
}

hardware := 2 if {
	input.tdx.quote.header.tee_type == "81000000"
	input.tdx.quote.header.vendor_id == "939a7233f79c4ca9940a0db3957f0607"
	input.tdx.quote.body.mr_td in query_reference_value("mr_td")
	input.tdx.tcb_status == "UpToDate"
	input.tdx.collateral_expiration_status == "0"
}

configuration := 2 if {
	input.tdx.td_attributes.debug == false
	input.tdx.quote.body.xfam in query_reference_value("xfam")
	tdx_init_data_is_good
}

tdx_init_data_is_good if query_reference_value("tdx_init_data") == null

tdx_init_data_is_good if input.tdx.init_data in query_reference_value("tdx_init_data")

##### SGX. An enclave by its measurement, or by who signed it, which product and how new it is.

executables := 3 if input.sgx.body.mr_enclave in query_reference_value("sgx_mr_enclave")

executables := 3 if {
	input.sgx.body.mr_signer in query_reference_value("sgx_mr_signer")
	input.sgx.body.isv_prod_id in query_reference_value("sgx_isv_prod_id")
	input.sgx.body.isv_svn in query_reference_value("sgx_isv_svn")
}

hardware := 2 if {
	input.sgx.header.vendor_id == "939a7233f79c4ca9940a0db3957f0607"
	input.sgx.tcb_status == "UpToDate"
	input.sgx.collateral_expiration_status == "0"
}

configuration := 2 if {
	input.sgx.debug == false
	input.sgx.init_data in query_reference_value("sgx_config_id")
}

configuration := 3 if {
	input.sgx.debug == false
	query_reference_value("sgx_config_id") == null
}

##### TPM. An attestation key counts where an operator named it, or where it was enrolled: by the maker of the TPM, whom the operator trusts. PCRs
##### are compared where there are reference values for them.

trusted_ak if input.tpm.ak_public in query_reference_value("trusted_aks")

trusted_ak if is_string(input.tpm.enrolled.name)

hardware := 2 if trusted_ak

executables := 3 if {
	trusted_ak
	count(tpm_named_pcrs) > 0
	every pcr in tpm_named_pcrs {
		input.tpm[pcr] in query_reference_value(sprintf("tpm_%s", [pcr]))
	}
}

tpm_named_pcrs contains pcr if {
	some pcr in tpm_pcrs
	query_reference_value(sprintf("tpm_%s", [pcr])) != null
}

tpm_pcrs := [
	"pcr00", "pcr01", "pcr02", "pcr03", "pcr04", "pcr05", "pcr06", "pcr07", "pcr08", "pcr09", "pcr10", "pcr11",
	"pcr12", "pcr13", "pcr14", "pcr15", "pcr16", "pcr17", "pcr18", "pcr19", "pcr20", "pcr21", "pcr22", "pcr23",
]

configuration := 2 if {
	trusted_ak
	input.tpm.init_data in query_reference_value("tpm_init_data")
}

configuration := 3 if {
	trusted_ak
	query_reference_value("tpm_init_data") == null
}

##### What the guest measured while it ran: its event log, replayed against the quote.

measured contains runtime if {
	some tee in ["sim", "snp", "tdx", "sgx", "tpm"]
	runtime := input[tee].runtime
	runtime.replayed == true
}

# 2: only recognised files: every image was admitted by a policy that a reference value names, or is itself named.
file_system := 2 if {
	some runtime in measured
	runtime.unknown == 0
	count(runtime.policies) > 0
	every digest in runtime.policies {
		digest in query_reference_value("image_policy")
	}
}

else := 2 if {
	some runtime in measured
	runtime.unknown == 0
	count(runtime.images) > 0
	every image in runtime.images {
		image.digest in query_reference_value("image_digest")
	}
}

# 32: there are reference values, and what was used is not among them.
else := 32 if {
	some runtime in measured
	count(runtime.policies) + count(runtime.images) > 0
	some name in ["image_policy", "image_digest"]
	query_reference_value(name) != null
}

# 2: what is stored is encrypted with keys that only the TEE has; what verity protects is only read. 32: a volume that something else protects.
storage_opaque := 2 if {
	some runtime in measured
	runtime.unknown == 0
	count(runtime.volumes) > 0
	every volume in runtime.volumes {
		volume.protection in ["disk", "fs", "luks2", "lazy", "verity"]
	}
}

else := 32 if {
	some runtime in measured
	count(runtime.volumes) > 0
}
