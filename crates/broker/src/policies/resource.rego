# The default release policy: a resource goes to guests whose every appraisal affirms them, and to nobody else.
package policy

import rego.v1

default allow := false

allow if {
	count(input.submods) > 0
	every module in input.submods {
		module["ear.status"] == "affirming"

		# 3: approved executables, no others. 2 and 3: recognised hardware and configuration.
		module["ear.trustworthiness-vector"].executables in [2, 3]
		module["ear.trustworthiness-vector"].hardware in [2, 3]
		module["ear.trustworthiness-vector"].configuration in [2, 3]
	}
}
