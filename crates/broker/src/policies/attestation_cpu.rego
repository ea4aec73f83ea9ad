# The default appraisal of a CPU's TEE: what its evidence is worth (AR4SI values).
# Everything that is not recognised stays at a value that the resource policy denies.
package policy

import rego.v1

# 33: executables that are not recognised. 97: hardware that is not recognised. 36: configuration that is not known to be good.
default executables := 33

default hardware := 97

default configuration := 36

trust_claims := {
	"executables": executables,
	"hardware": hardware,
	"configuration": configuration,
	"file-system": 0,
	"instance-identity": 0,
	"runtime-opaque": 0,
	"storage-opaque": 0,
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
